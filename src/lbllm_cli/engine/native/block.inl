// A decoder block: norms, rotary embedding, attention over the 4-bit cache, MLP.

namespace {

inline void rms_norm(const float* x, const float* weight, float epsilon, int n, float* out) {
    float total = 0.0f;
    v8f squares = {};
    int i = 0;
    for (; i + 8 <= n; i += 8) squares = fused(load<v8f>(x + i), load<v8f>(x + i), squares);
    for (; i < n; i++) total += x[i] * x[i];
    const float scale = 1.0f / __builtin_sqrtf((sum(squares) + total) / static_cast<float>(n) + epsilon);
    for (i = 0; i < n; i++) out[i] = x[i] * scale * weight[i];
}

// In place, one head. cosine, sine: [n].
inline void rotate(float* x, const float* cosine, const float* sine, int n) {
    for (int i = 0; i < n / 2; i++) {
        const float a = x[i], b = x[i + n / 2];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + n / 2] = b * cosine[i + n / 2] + a * sine[i + n / 2];
    }
}

struct HeadNorms {
    const float *query, *key;  // [head_dim], or NULL
};

// Tokens that go through a block at once: `count` of each row, behind those that the cache holds.
struct Span {
    int64_t rows, count;

    int64_t size() const { return rows * count; }
};

// Norms and rotates queries and keys of new token `at` of a row in place, centres its key, and writes it and its value to the
// cache.
void place_token(const lbllm_block* b, const lbllm_cache* cache, const HeadNorms& norms, int64_t row, int64_t at, float* qkv,
                 const float* cosine, const float* sine) {
    const int d = b->head_dim;
    const Records keys(b->keys, d), values(b->values, d);
    for (int h = 0; h < b->heads + b->kv_heads; h++) {
        const float* norm = h < b->heads ? norms.query : norms.key;
        if (norm) rms_norm(qkv + h * d, norm, b->epsilon, d, qkv + h * d);
        rotate(qkv + h * d, cosine, sine, d);
    }
    if (b->key_centre)
        for (int i = 0; i < b->kv_heads * d; i++) qkv[b->heads * d + i] -= b->key_centre[i];
    const int64_t token = cache->tokens + at;
    for (int h = 0; h < b->kv_heads; h++) {
        uint8_t* key = cache->keys + row * cache->key_row_stride + h * cache->key_head_stride;
        uint8_t* value = cache->values + row * cache->value_row_stride + h * cache->value_head_stride;
        keys.write(qkv + (b->heads + h) * d, key + token * keys.size_of());
        values.write(qkv + (b->heads + b->kv_heads + h) * d, value + token * values.size_of());
    }
}

// gate * sigmoid(gate) * up of one row [2 * n] to [n].
void gated(const float* gate_up, int n, float* out) {
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        const v8f gate = load<v8f>(gate_up + i), up = load<v8f>(gate_up + n + i);
        store(out + i, gate / (all(1.0f) + exponential(-gate)) * up);
    }
    for (; i < n; i++) out[i] = gate_up[i] / (1.0f + exponential(all(-gate_up[i]))[0]) * gate_up[n + i];
}

// Norm weights of a block as floats. Read anew in every step: the model may have been given others since the last one.
struct Norms {
    const float *attention, *mlp;  // [hidden]
    HeadNorms heads;

    static int64_t floats(const lbllm_block* b) { return 2 * (static_cast<int64_t>(b->hidden) + b->head_dim); }

    // memory: `floats` of them.
    Norms(const lbllm_block* b, float* memory) {
        const void* from[4] = {b->attention_norm, b->mlp_norm, b->query_norm, b->key_norm};
        const float* found[4] = {};
        for (int i = 0; i < 4; i++) {
            const int width = i < 2 ? b->hidden : b->head_dim;
            if (!from[i]) continue;
            read_floats(from[i], b->norm_dtype, 0, width, memory);
            found[i] = memory;
            memory += width;
        }
        attention = found[0], mlp = found[1];
        heads = {found[2], found[3]};
    }
};

constexpr int64_t kElementsPerThread = 1 << 14;

// stream: [rows, count, hidden], in place. cosine, sine: [rows, count, head_dim].
void block_run(const lbllm_block* b, const lbllm_cache* cache, const Span& span, float* stream, const float* cosine,
               const float* sine, int threads) {
    static thread_local Scratch<float> memory;
    const int64_t h = b->hidden, d = b->head_dim, n = span.size(), wide = (b->heads + 2 * b->kv_heads) * d, inner = b->intermediate;
    float* normed = memory.of(n * (h + wide + b->heads * d + 3 * inner) + Norms::floats(b));
    float* qkv = normed + n * h;
    float* mixed = qkv + n * wide;
    float* gate_up = mixed + n * b->heads * d;
    float* product = gate_up + 2 * n * inner;
    const Norms norms(b, product + n * inner);
    const int some = useful_threads(threads, n * h, kElementsPerThread);
    (void)some;
#pragma omp parallel for num_threads(some) schedule(static) if (some > 1)
    for (int64_t m = 0; m < n; m++) rms_norm(stream + m * h, norms.attention, b->epsilon, b->hidden, normed + m * h);
    project(b->qkv, b->qkv_input, normed, qkv, LBLLM_FLOAT32, n, threads);
#pragma omp parallel for num_threads(some) schedule(static) if (some > 1)
    for (int64_t m = 0; m < n; m++)
        place_token(b, cache, norms.heads, m / span.count, m % span.count, qkv + m * wide, cosine + m * d, sine + m * d);
    if (span.count == 1)
        attend(b, cache, qkv, wide, span.rows, mixed, threads);
    else
        attend_many(b, cache, qkv, wide, span.rows, span.count, mixed, threads);
    project(b->o, b->o_input, mixed, normed, LBLLM_FLOAT32, n, threads);
#pragma omp parallel for num_threads(some) schedule(static) if (some > 1)
    for (int64_t m = 0; m < n; m++) {
        for (int64_t i = m * h; i < (m + 1) * h; i++) stream[i] += normed[i];
        rms_norm(stream + m * h, norms.mlp, b->epsilon, b->hidden, normed + m * h);
    }
    project(b->gate_up, b->gate_up_input, normed, gate_up, LBLLM_FLOAT32, n, threads);
#pragma omp parallel for num_threads(some) schedule(static) if (some > 1)
    for (int64_t m = 0; m < n; m++) gated(gate_up + m * 2 * inner, b->intermediate, product + m * inner);
    project(b->down, b->down_input, product, normed, LBLLM_FLOAT32, n, threads);
    for (int64_t i = 0; i < n * h; i++) stream[i] += normed[i];
}

void block_step(const lbllm_block* b, const lbllm_cache* cache, const void* in, void* out, const void* cosine, const void* sine,
                int32_t dtype, int64_t rows, int32_t threads) {
    static thread_local Scratch<float> memory;
    const int64_t h = b->hidden, d = b->head_dim;
    float* stream = memory.of(rows * (h + 2 * d));
    float* angles = stream + rows * h;
    read_floats(in, dtype, 0, static_cast<int>(rows * h), stream);
    read_floats(cosine, dtype, 0, static_cast<int>(rows * d), angles);
    read_floats(sine, dtype, 0, static_cast<int>(rows * d), angles + rows * d);
    block_run(b, cache, {rows, 1}, stream, angles, angles + rows * d, threads);
    write_floats(stream, static_cast<int>(rows * h), out, dtype, 0);
}

}  // namespace
