// One new token per row through a decoder block: norms, rotary embedding, attention over the 4-bit cache, MLP.

namespace {

// Records of keys or values: groups of `size` 4-bit codes, a bfloat16 step, a byte for the table (knee) or the zero (uniform).
struct Records {
    const lbllm_quantizer* q;
    int width, size, groups, codes, padded;  // padded: floats of a decoded record, 32 for every 16 bytes of codes

    Records(const lbllm_quantizer* quantizer, int head_dim)
        : q(quantizer),
          width(head_dim),
          size(quantizer->size),
          groups(static_cast<int>(lbllm::ceil_div(head_dim, size))),
          codes((size + 1) / 2),
          padded(static_cast<int>(lbllm::ceil_div(codes, 16)) * 32) {}

    int size_of() const { return groups * (codes + 3); }
    int floats() const { return groups * padded; }

    // Place of value i of a head in a decoded record: of each 16 bytes, the low nibbles come first.
    int place(int i) const {
        const int in = i % size;
        return i / size * padded + in / 32 * 32 + in % 2 * 16 + in % 32 / 2;
    }

    void write(const float* x, uint8_t* record) const {
        alignas(64) float values[256];
        alignas(64) int8_t lattice[512];
        for (int g = 0; g < groups; g++, record += codes + 3) {
            fill(values, values + padded_values(), 0.0f);
            memcpy(values, x + g * size, static_cast<size_t>(smaller(size, width - g * size)) * 4);
            const Group found = quantize_group(*q, values, padded_values(), lattice);
            memset(record, 0, static_cast<size_t>(codes));
            for (int i = 0; i < size; i++) {
                const int place = found.lattice[i] + found.zero, code = q->tables ? q->code[found.table][place] : place;
                record[i / 2] |= static_cast<uint8_t>(code << (i % 2 * 4));
            }
            const uint16_t step = to_bfloat16(found.step);
            memcpy(record + codes, &step, 2);
            record[codes + 2] = static_cast<uint8_t>(q->tables ? found.table : found.zero);
        }
    }

    int padded_values() const { return ::padded(size); }

    // Step times T - Z of all values, in decoded order.
    void read(const uint8_t* record, float* out) const {
        for (int g = 0; g < groups; g++, record += codes + 3) {
            uint16_t stored;
            memcpy(&stored, record + codes, 2);
            const v8f step = all(from_bfloat16(stored));
            const int mark = record[codes + 2];
            const int8_t* value = q->value[q->tables ? mark & 1 : 0];
            const v8f shift = all(q->tables ? 0.0f : static_cast<float>(mark));
            for (int at = 0; at < codes; at += 16, out += 32) {
                alignas(16) uint8_t packed[16] = {};
                alignas(16) int8_t found[32];
                const bool whole = at + 16 <= codes;
                if (!whole) memcpy(packed, record + at, static_cast<size_t>(codes - at));
                nibbles(whole ? record + at : packed, value, found);
                for (int i = 0; i < 32; i += 8) store(out + i, (bytes(found + i) - shift) * step);
            }
        }
    }
};

inline float dot(const float* a, const float* b, int n) {
    v8f x = {}, y = {};
    for (int i = 0; i < n; i += 16) {
        x = fused(load<v8f>(a + i), load<v8f>(b + i), x);
        y = fused(load<v8f>(a + i + 8), load<v8f>(b + i + 8), y);
    }
    return sum(x + y);
}

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

struct HeadNorms {
    const float *query, *key;  // [head_dim], or NULL
};

// Norms and rotates queries and keys of one row in place, centres its key, and writes it and its value to the cache.
void place_row(const lbllm_block* b, const lbllm_cache* cache, const HeadNorms& norms, int64_t row, float* qkv, const float* cosine,
               const float* sine) {
    const int d = b->head_dim;
    const Records keys(b->keys, d), values(b->values, d);
    for (int h = 0; h < b->heads + b->kv_heads; h++) {
        const float* norm = h < b->heads ? norms.query : norms.key;
        if (norm) rms_norm(qkv + h * d, norm, b->epsilon, d, qkv + h * d);
        rotate(qkv + h * d, cosine, sine, d);
    }
    if (b->key_centre)
        for (int i = 0; i < b->kv_heads * d; i++) qkv[b->heads * d + i] -= b->key_centre[i];
    for (int h = 0; h < b->kv_heads; h++) {
        uint8_t* key = cache->keys + row * cache->key_row_stride + h * cache->key_head_stride + cache->tokens * keys.size_of();
        uint8_t* value = cache->values + row * cache->value_row_stride + h * cache->value_head_stride;
        value += cache->tokens * values.size_of();
        keys.write(qkv + (b->heads + h) * d, key);
        values.write(qkv + (b->heads + b->kv_heads + h) * d, value);
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

void block_step(const lbllm_block* b, const lbllm_cache* cache, const void* in, void* out, const void* cosine, const void* sine,
                int32_t dtype, int64_t rows, int32_t threads) {
    static thread_local Scratch<float> memory;
    const int64_t h = b->hidden, d = b->head_dim, wide = (b->heads + 2 * b->kv_heads) * d;
    float* stream = memory.of(rows * (2 * h + wide + b->heads * d + 3 * b->intermediate) + 2 * rows * d + 2 * h + 2 * d);
    float* normed = stream + rows * h;
    float* qkv = normed + rows * h;
    float* mixed = qkv + rows * wide;
    float* gate_up = mixed + rows * b->heads * d;
    float* inner = gate_up + 2 * rows * b->intermediate;
    float* angles = inner + rows * b->intermediate;
    read_floats(in, dtype, 0, static_cast<int>(rows * h), stream);
    read_floats(cosine, dtype, 0, static_cast<int>(rows * d), angles);
    read_floats(sine, dtype, 0, static_cast<int>(rows * d), angles + rows * d);
    // Read anew in every step: the model may have been given others since the last one.
    float* norms = angles + 2 * rows * d;
    read_floats(b->attention_norm, b->norm_dtype, 0, b->hidden, norms);
    read_floats(b->mlp_norm, b->norm_dtype, 0, b->hidden, norms + h);
    const HeadNorms heads{b->query_norm ? norms + 2 * h : nullptr, b->key_norm ? norms + 2 * h + d : nullptr};
    if (heads.query) read_floats(b->query_norm, b->norm_dtype, 0, b->head_dim, norms + 2 * h);
    if (heads.key) read_floats(b->key_norm, b->norm_dtype, 0, b->head_dim, norms + 2 * h + d);
    for (int64_t m = 0; m < rows; m++) rms_norm(stream + m * h, norms, b->epsilon, b->hidden, normed + m * h);
    project(b->qkv, b->qkv_input, normed, qkv, LBLLM_FLOAT32, rows, threads);
    for (int64_t m = 0; m < rows; m++) place_row(b, cache, heads, m, qkv + m * wide, angles + m * d, angles + (rows + m) * d);
    attend(b, cache, qkv, wide, rows, mixed, threads);
    project(b->o, b->o_input, mixed, normed, LBLLM_FLOAT32, rows, threads);
    for (int64_t i = 0; i < rows * h; i++) stream[i] += normed[i];
    for (int64_t m = 0; m < rows; m++) rms_norm(stream + m * h, norms + h, b->epsilon, b->hidden, normed + m * h);
    project(b->gate_up, b->gate_up_input, normed, gate_up, LBLLM_FLOAT32, rows, threads);
    for (int64_t m = 0; m < rows; m++) gated(gate_up + m * 2 * b->intermediate, b->intermediate, inner + m * b->intermediate);
    project(b->down, b->down_input, inner, normed, LBLLM_FLOAT32, rows, threads);
    for (int64_t i = 0; i < rows * h; i++) stream[i] += normed[i];
    write_floats(stream, static_cast<int>(rows * h), out, dtype, 0);
}

}  // namespace
