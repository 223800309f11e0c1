// Attention over the quantized cache of one new token per row.

namespace {

inline float dot(const float* a, const float* b, int n) {
    v8f x = {}, y = {};
    for (int i = 0; i < n; i += 16) {
        x = fused(load<v8f>(a + i), load<v8f>(b + i), x);
        y = fused(load<v8f>(a + i + 8), load<v8f>(b + i + 8), y);
    }
    return sum(x + y);
}

// Attention of the heads that share one key head over tokens first .. last: per head the largest score, the sum of the weights
// relative to it, and the weighted values.
struct Part {
    const lbllm_block* b;
    const lbllm_cache* cache;
    int64_t row;
    int head;  // of keys and values
    int64_t first, last;

    int shared() const { return b->heads / b->kv_heads; }

    // q: [shared][keys.floats()], scaled, in decoded order. out: [shared][2 + values.floats()].
    void run(const float* q, float* out) const {
        const Records keys(b->keys, b->head_dim), values(b->values, b->head_dim);
        static thread_local Scratch<float> memory;
        const int64_t tokens = last - first, room = tokens + 8;
        float* decoded = memory.of(larger(keys.floats(), values.floats()) + shared() * room);
        float* scores = decoded + larger(keys.floats(), values.floats());
        const uint8_t* key = cache->keys + row * cache->key_row_stride + head * cache->key_head_stride + first * keys.size_of();
        for (int64_t t = 0; t < tokens; t++, key += keys.size_of()) {
            keys.read(key, decoded);
            const float bias = cache->mask ? cache->mask[row * (cache->tokens + 1) + first + t] : 0.0f;
            for (int h = 0; h < shared(); h++) scores[h * room + t] = dot(q + h * keys.floats(), decoded, keys.floats()) + bias;
        }
        const int wide = 2 + values.floats();
        for (int h = 0; h < shared(); h++) soften(scores + h * room, tokens, out + h * wide);
        const uint8_t* value = cache->values + row * cache->value_row_stride + head * cache->value_head_stride;
        value += first * values.size_of();
        for (int64_t t = 0; t < tokens; t++, value += values.size_of()) {
            values.read(value, decoded);
            for (int h = 0; h < shared(); h++) {
                const v8f weight = all(scores[h * room + t]);
                float* to = out + h * wide + 2;
                for (int i = 0; i < values.floats(); i += 8)
                    store(to + i, fused(weight, load<v8f>(decoded + i), load<v8f>(to + i)));
            }
        }
    }

    // Scores to e^(score - largest), in place; the largest and their sum to out, zeros behind them.
    void soften(float* scores, int64_t tokens, float* out) const {
        float top = scores[0];
        for (int64_t t = 1; t < tokens; t++) top = larger(top, scores[t]);
        fill(scores + tokens, scores + tokens + 8, -1e30f);
        v8f total = {};
        for (int64_t t = 0; t < tokens; t += 8) {
            const v8f weight = exponential(load<v8f>(scores + t) - all(top));
            store(scores + t, weight);
            total += weight;
        }
        fill(out, out + 2 + Records(b->values, b->head_dim).floats(), 0.0f);
        out[0] = top;
        out[1] = sum(total);
    }
};

constexpr int64_t kTokensPerThread = 64;  // of the cache, times its heads

// query: [rows][heads * head_dim], rotated. out: the same shape.
void attend(const lbllm_block* b, const lbllm_cache* cache, const float* query, int64_t query_stride, int64_t rows, float* out,
            int threads) {
    static thread_local Scratch<float> memory;
    const Records keys(b->keys, b->head_dim), values(b->values, b->head_dim);
    const int64_t tokens = cache->tokens + 1, heads = rows * b->kv_heads;
    const int shared = b->heads / b->kv_heads, wide = 2 + values.floats();
    threads = useful_threads(threads, tokens * heads, kTokensPerThread);
    const int64_t parts = heads % threads == 0 ? 1 : threads;  // of the tokens: three key heads do not divide among two threads
    const int64_t length = lbllm::ceil_div(tokens, parts), used = lbllm::ceil_div(tokens, length);
    float* ordered = memory.of(heads * shared * (keys.floats() + parts * wide));
    float* results = ordered + heads * shared * keys.floats();
    fill(ordered, results, 0.0f);
    for (int64_t h = 0; h < heads * shared; h++) {
        const float* from = query + h / b->heads * query_stride + h % b->heads * b->head_dim;
        for (int i = 0; i < b->head_dim; i++) ordered[h * keys.floats() + keys.place(i)] = from[i] * b->scaling;
    }
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t task = 0; task < heads * used; task++) {
        const int64_t h = task / used, part = task % used;
        const int64_t last = smaller(tokens, (part + 1) * length);
        const Part work{b, cache, h / b->kv_heads, static_cast<int>(h % b->kv_heads), part * length, last};
        work.run(ordered + h * shared * keys.floats(), results + task * shared * wide);
    }
    for (int64_t h = 0; h < heads * shared; h++) {
        const float* part = results + (h / shared * used * shared + h % shared) * wide;
        float top = part[0], total = 0.0f;
        for (int64_t p = 1; p < used; p++) top = larger(top, part[p * shared * wide]);
        float* to = out + h * b->head_dim;
        fill(to, to + b->head_dim, 0.0f);
        for (int64_t p = 0; p < used; p++, part += shared * wide) {
            const float weight = exponential(all(part[0] - top))[0];
            total += weight * part[1];
            for (int i = 0; i < b->head_dim; i++) to[i] += weight * part[2 + values.place(i)];
        }
        for (int i = 0; i < b->head_dim; i++) to[i] /= total;
    }
}

}  // namespace
