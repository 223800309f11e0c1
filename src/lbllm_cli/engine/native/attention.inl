// Attention over the quantized cache of one new token per row.

namespace {

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
        const int64_t tokens = last - first, room = (tokens / kLanes + 1) * kLanes;
        float* decoded = memory.of(kLanes * larger(keys.floats(), values.floats()) + shared() * room);
        float* scores = decoded + kLanes * larger(keys.floats(), values.floats());
        const uint8_t* key = cache->keys + row * cache->key_row_stride + head * cache->key_head_stride + first * keys.size_of();
        for (int64_t t = 0; t < tokens; t += kLanes, key += kLanes * keys.size_of()) {
            const int some = static_cast<int>(smaller<int64_t>(kLanes, tokens - t));
            for (int i = 0; i < some; i++) keys.read(key + i * keys.size_of(), decoded + i * keys.floats());
            for (int h = 0; h < shared(); h++)
                store(scores + h * room + t, products(q + h * keys.floats(), decoded, keys.floats(), some));
        }
        for (int64_t t = 0; cache->mask && t < tokens; t++)
            for (int h = 0; h < shared(); h++) scores[h * room + t] += cache->mask[row * (cache->tokens + 1) + first + t];
        const int wide = 2 + values.floats();
        for (int h = 0; h < shared(); h++) soften(scores + h * room, tokens, out + h * wide);
        const uint8_t* value = cache->values + row * cache->value_row_stride + head * cache->value_head_stride;
        value += first * values.size_of();
        for (int64_t t = 0; t < tokens; t += kLanes, value += kLanes * values.size_of()) {
            const int some = static_cast<int>(smaller<int64_t>(kLanes, tokens - t));
            for (int i = 0; i < some; i++) values.read(value + i * values.size_of(), decoded + i * values.floats());
            for (int h = 0; h < shared(); h++) gather(scores + h * room + t, decoded, values.floats(), some, out + h * wide + 2);
        }
    }

    // Products of one query with `some` keys, at most kLanes; the rest is of no meaning.
    static Floats products(const float* q, const float* keys, int n, int some) {
        Floats sums[kLanes] = {};
        for (int t = 0; t < some; t++, keys += n)
            for (int i = 0; i < n; i += kLanes) sums[t] = fused(load<Floats>(q + i), load<Floats>(keys + i), sums[t]);
        return sums_of(sums);
    }

    // to [n] += the sum of `some` values, each times its weight.
    static void gather(const float* weights, const float* values, int n, int some, float* to) {
        for (int i = 0; i < n; i += kLanes) {
            Floats sum = load<Floats>(to + i);
            for (int t = 0; t < some; t++) sum = fused(every(weights[t]), load<Floats>(values + t * n + i), sum);
            store(to + i, sum);
        }
    }

    // Scores to e^(score - largest), in place; the largest and their sum to out, zeros behind them.
    void soften(float* scores, int64_t tokens, float* out) const {
        float top = scores[0];
        for (int64_t t = 1; t < tokens; t++) top = larger(top, scores[t]);
        fill(scores + tokens, scores + (tokens / kLanes + 1) * kLanes, -1e30f);
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
