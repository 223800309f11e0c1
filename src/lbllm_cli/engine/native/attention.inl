// Attention over the quantized cache of one new token per row.

namespace {

// A number of tokens that the compiler knows.
struct AllLanes {
    constexpr operator int() const { return kLanes; }
};

// sums [t] += kVectors vectors of a query times those of each of `some` keys, n floats apart.
template <int kVectors, typename Some>
inline void add_products(const float* q, const float* keys, int n, Some some, Floats* sums) {
    Floats own[kVectors];
    for (int v = 0; v < kVectors; v++) own[v] = load<Floats>(q + v * kLanes);
    for (int t = 0; t < some; t++)
        for (int v = 0; v < kVectors; v++) sums[t] = fused(own[v], load<Floats>(keys + t * n + v * kLanes), sums[t]);
}

// Products of one query with `some` keys, at most kLanes; what is behind them has no meaning.
template <typename Some>
inline Floats products_of(const float* q, const float* keys, int n, Some some) {
    Floats sums[kLanes] = {};
    int i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) add_products<4>(q + i, keys + i, n, some, sums);
    for (; i < n; i += kLanes) add_products<1>(q + i, keys + i, n, some, sums);
    return sums_of(sums);
}

// kVectors vectors of to += those of `some` values, n floats apart, each times its weight.
template <int kVectors, typename Some>
inline void add_values(const float* weights, const float* values, int n, Some some, float* to) {
    Floats sums[kVectors];
    for (int v = 0; v < kVectors; v++) sums[v] = load<Floats>(to + v * kLanes);
    for (int t = 0; t < some; t++) {
        const Floats weight = every(weights[t]);
        for (int v = 0; v < kVectors; v++) sums[v] = fused(weight, load<Floats>(values + t * n + v * kLanes), sums[v]);
    }
    for (int v = 0; v < kVectors; v++) store(to + v * kLanes, sums[v]);
}

// to [n] += the sum of `some` values, each times its weight.
template <typename Some>
inline void gather(const float* weights, const float* values, int n, Some some, float* to) {
    int i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) add_values<4>(weights, values + i, n, some, to + i);
    for (; i < n; i += kLanes) add_values<1>(weights, values + i, n, some, to + i);
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
        const bool usual = keys.codes == 32 && values.codes == 32 && keys.groups == values.groups;
        if (usual && keys.groups == 1) return run<32, 64>(keys, values, q, out);
        if (usual && keys.groups == 2) return run<32, 128>(keys, values, q, out);
        run<0, 0>(keys, values, q, out);
    }

    // kCodes: bytes of the codes of a group, kFloats: of a decoded record; 0: any number.
    template <int kCodes, int kFloats>
    void run(const Records& keys, const Records& values, const float* q, float* out) const {
        const int key_floats = kFloats ? kFloats : keys.floats(), value_floats = kFloats ? kFloats : values.floats();
        static thread_local Scratch<float> memory;
        const int64_t tokens = last - first, room = (tokens / kLanes + 1) * kLanes;
        float* decoded = memory.of(kLanes * larger(key_floats, value_floats) + shared() * room);
        float* scores = decoded + kLanes * larger(key_floats, value_floats);
        const uint8_t* key = cache->keys + row * cache->key_row_stride + head * cache->key_head_stride + first * keys.size_of();
        const auto score = [&](int64_t t, auto some) {
            for (int i = 0; i < some; i++) keys.read<kCodes>(key + (t + i) * keys.size_of(), decoded + i * key_floats);
            for (int h = 0; h < shared(); h++)
                store(scores + h * room + t, products_of(q + h * key_floats, decoded, key_floats, some));
        };
        const int64_t whole = tokens / kLanes * kLanes;
        // A number of tokens that is known leaves sums in registers: two thirds of the time.
        for (int64_t t = 0; t < whole; t += kLanes) score(t, AllLanes{});
        if (whole < tokens) score(whole, static_cast<int>(tokens - whole));
        for (int64_t t = 0; cache->mask && t < tokens; t++)
            for (int h = 0; h < shared(); h++) scores[h * room + t] += cache->mask[row * (cache->tokens + 1) + first + t];
        const int wide = 2 + value_floats;
        for (int h = 0; h < shared(); h++) soften(scores + h * room, tokens, out + h * wide);
        const uint8_t* value = cache->values + row * cache->value_row_stride + head * cache->value_head_stride;
        value += first * values.size_of();
        const auto mix = [&](int64_t t, auto some) {
            for (int i = 0; i < some; i++) values.read<kCodes>(value + (t + i) * values.size_of(), decoded + i * value_floats);
            for (int h = 0; h < shared(); h++) gather(scores + h * room + t, decoded, value_floats, some, out + h * wide + 2);
        };
        for (int64_t t = 0; t < whole; t += kLanes) mix(t, AllLanes{});
        if (whole < tokens) mix(whole, static_cast<int>(tokens - whole));
    }

    // Scores to e^(score - largest), in place; the largest and their sum to out, zeros behind them.
    void soften(float* scores, int64_t tokens, float* out) const {
        fill(scores + tokens, scores + (tokens / kLanes + 1) * kLanes, -1e30f);
        v8f most = load<v8f>(scores);
        for (int64_t t = 8; t < tokens; t += 8) most = maximum(most, load<v8f>(scores + t));
        const float top = largest(most);
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
