// A whole model: embedding, blocks, the last norm, head.

namespace {

constexpr int64_t kRunTokens = 256;  // that go through all blocks together, whatever the length of a prompt

// Cosine and sine of the rotary embedding at positions first .. first + count: [count, head_dim] each, halves alike.
void rotary(const lbllm_model* model, int64_t first, int64_t count, float* cosine, float* sine) {
    const int half = model->head_dim / 2;
    for (int64_t m = 0; m < count; m++)
        for (int i = 0; i < half; i++) {
            const float angle = static_cast<float>(first + m) * model->frequencies[i];
            const int64_t at = m * model->head_dim + i;
            cosine[at] = cosine[at + half] = __builtin_cosf(angle) * model->amplitude;
            sine[at] = sine[at + half] = __builtin_sinf(angle) * model->amplitude;
        }
}

void run(const lbllm_model* model, const lbllm_cache* caches, const int32_t* tokens, int64_t count, float* logits, int32_t threads) {
    static thread_local Scratch<float> memory;
    const int64_t h = model->hidden, d = model->head_dim, room = smaller(count, kRunTokens);
    float* stream = memory.of(room * (h + 2 * d) + 2 * h);
    float* cosine = stream + room * h;
    float* sine = cosine + room * d;
    int64_t some = 0;
    for (int64_t first = 0; first < count; first += kRunTokens) {
        some = smaller(kRunTokens, count - first);
        for (int64_t m = 0; m < some; m++)
            read_row(model->embedding, tokens[first + m], model->hidden, stream + m * h);
        rotary(model, caches[0].tokens + first, some, cosine, sine);
        for (int b = 0; b < model->count; b++) {
            lbllm_cache cache = caches[b];
            cache.tokens += first;
            block_run(model->blocks + b, &cache, {1, some}, stream, cosine, sine, threads);
        }
    }
    if (!logits) return;
    float* weight = sine + room * d;
    float* normed = weight + h;
    read_floats(model->norm, model->norm_dtype, 0, model->hidden, weight);
    rms_norm(stream + (some - 1) * h, weight, model->epsilon, model->hidden, normed);
    head(&model->head, normed, logits, model->hidden, model->vocab, LBLLM_FLOAT32, 1, threads);
}

}  // namespace
