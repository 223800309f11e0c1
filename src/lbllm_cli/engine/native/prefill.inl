// Attention over the quantized cache of several new tokens per row: each sees those before it, and itself.

namespace {

constexpr int kQueries = 32;  // tokens that share decoded keys and values
constexpr int kKeys = 128;    // decoded at once: with the queries they stay in a core's own cache
constexpr int kTileRows = 6;
constexpr int kTileColumns = 2 * kLanes;

// c [rows, columns] += a [rows, depth] b [depth, columns]. rows: whole tiles of kTileRows; columns: of kTileColumns.
inline void add_product(const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c, int64_t c_stride, int rows,
                        int columns, int depth) {
    for (int r = 0; r < rows; r += kTileRows)
        for (int k = 0; k < columns; k += kTileColumns) {
            Floats sums[kTileRows][2];
            for (int i = 0; i < kTileRows; i++)
                for (int j = 0; j < 2; j++) sums[i][j] = load<Floats>(c + (r + i) * c_stride + k + kLanes * j);
            for (int d = 0; d < depth; d++) {
                const Floats left = load<Floats>(b + d * b_stride + k), right = load<Floats>(b + d * b_stride + k + kLanes);
                for (int i = 0; i < kTileRows; i++) {
                    const Floats factor = every(a[(r + i) * a_stride + d]);
                    sums[i][0] = fused(factor, left, sums[i][0]);
                    sums[i][1] = fused(factor, right, sums[i][1]);
                }
            }
            for (int i = 0; i < kTileRows; i++)
                for (int j = 0; j < 2; j++) store(c + (r + i) * c_stride + k + kLanes * j, sums[i][j]);
        }
}

inline int64_t whole_tiles(int64_t n, int tile) { return lbllm::ceil_div(n, tile) * tile; }

// Queries of some tokens of one key head, and what they have gathered so far.
struct Queries {
    const lbllm_block* b;
    Records keys, values;
    int shared, count, rows;    // heads of a key head; tokens; both together, in whole tiles
    int64_t key_width, width;   // of decoded records, in whole tiles
    float *query, *gathered;    // [rows, key_width], [rows, width]
    float *top, *total;         // [rows]: largest score, sum of weights relative to it
    float *scores;              // [rows, kKeys]
    float *turned, *decoded;    // keys [key_width, kKeys], values [kKeys, width]
    float *raw;                 // one record

    Queries(const lbllm_block* block, int tokens)
        : b(block),
          keys(b->keys, b->head_dim),
          values(b->values, b->head_dim),
          shared(b->heads / b->kv_heads),
          count(tokens),
          rows(static_cast<int>(whole_tiles(tokens * shared, kTileRows))),
          key_width(whole_tiles(keys.floats(), kTileColumns)),
          width(whole_tiles(values.floats(), kTileColumns)) {
        static thread_local Scratch<float> memory;
        query = memory.of(rows * (key_width + width + 2 + kKeys) + kKeys * (key_width + width) + key_width + width);
        gathered = query + rows * key_width;
        scores = gathered + rows * width;
        turned = scores + rows * kKeys;
        decoded = turned + key_width * kKeys;
        raw = decoded + kKeys * width;
        top = raw + key_width + width;
        total = top + rows;
        fill(query, scores, 0.0f);
        fill(decoded, decoded + kKeys * width, 0.0f);
        fill(top, total, -1e30f);
        fill(total, total + rows, 0.0f);
    }

    // from: the queries of a token's heads, and of the next one `stride` floats behind.
    void take(const float* from, int64_t stride) {
        for (int r = 0; r < count * shared; r++) {
            const float* head = from + r / shared * stride + r % shared * b->head_dim;
            for (int i = 0; i < b->head_dim; i++) query[r * key_width + keys.place(i)] = head[i] * b->scaling;
        }
    }

    // Adds `n` keys and values. seen: of them, by the first token; every later one sees one more.
    void add(const uint8_t* key, const uint8_t* value, int n, int64_t seen) {
        for (int t = 0; t < n; t++, key += keys.size_of(), value += values.size_of()) {
            keys.read(key, raw);
            for (int i = 0; i < keys.floats(); i++) turned[i * kKeys + t] = raw[i];
            values.read(value, decoded + t * width);
        }
        const int columns = static_cast<int>(whole_tiles(n, kTileColumns));
        fill(scores, scores + rows * kKeys, 0.0f);
        add_product(query, key_width, turned, kKeys, scores, kKeys, rows, columns, keys.floats());
        for (int r = 0; r < rows; r++) soften(r, static_cast<int>(smaller<int64_t>(n, larger<int64_t>(0, seen + r / shared))), n);
        add_product(scores, kKeys, decoded, width, gathered, width, rows, static_cast<int>(width), n);
    }

    // Scores of a row to weights relative to the largest so far; what it has gathered is scaled to that.
    void soften(int r, int seen, int n) {
        float* row = scores + r * kKeys;
        fill(row + seen, row + whole_tiles(n, 8), -1e30f);
        v8f most = all(top[r]);
        for (int t = 0; t < n; t += 8) most = maximum(most, load<v8f>(row + t));
        const float found = largest(most);
        v8f added = {};
        for (int t = 0; t < n; t += 8) {
            // What is not seen has no weight, also where nothing has been seen yet.
            const v8f weight = found > -1e30f ? exponential(load<v8f>(row + t) - all(found)) : v8f{};
            store(row + t, weight);
            added += weight;
        }
        const float kept = exponential(all(top[r] - found))[0];
        total[r] = total[r] * kept + sum(added);
        top[r] = found;
        if (kept == 1.0f) return;
        for (int i = 0; i < width; i += 8) store(gathered + r * width + i, load<v8f>(gathered + r * width + i) * all(kept));
    }

    // to: as `take`.
    void give(float* to, int64_t stride) const {
        for (int r = 0; r < count * shared; r++) {
            float* head = to + r / shared * stride + r % shared * b->head_dim;
            for (int i = 0; i < b->head_dim; i++) head[i] = gathered[r * width + values.place(i)] / total[r];
        }
    }
};

// query: [rows, count, heads * head_dim] at query_stride, rotated; the keys and values of these tokens are in the cache behind its
// own. out: [rows, count, heads * head_dim]. No mask.
void attend_many(const lbllm_block* b, const lbllm_cache* cache, const float* query, int64_t query_stride, int64_t rows,
                 int64_t count, float* out, int threads) {
    const int64_t tiles = lbllm::ceil_div(count, kQueries), stride = static_cast<int64_t>(b->heads) * b->head_dim;
    const int shared = b->heads / b->kv_heads;
    (void)threads;
    // The last tiles see most: they come first, and whoever is done takes the next.
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (int64_t task = 0; task < rows * b->kv_heads * tiles; task++) {
        const int64_t tile = tiles - 1 - task / (rows * b->kv_heads), row = task / b->kv_heads % rows, head = task % b->kv_heads;
        const int64_t first = tile * kQueries, n = smaller<int64_t>(kQueries, count - first);
        Queries queries(b, static_cast<int>(n));
        const int64_t at = row * count + first, own = head * shared * b->head_dim;
        queries.take(query + at * query_stride + own, query_stride);
        const uint8_t* key = cache->keys + row * cache->key_row_stride + head * cache->key_head_stride;
        const uint8_t* value = cache->values + row * cache->value_row_stride + head * cache->value_head_stride;
        const int64_t before = cache->tokens + first;
        for (int64_t t = 0; t < before + n; t += kKeys) {
            const int some = static_cast<int>(smaller<int64_t>(kKeys, before + n - t));
            queries.add(key + t * queries.keys.size_of(), value + t * queries.values.size_of(), some, before + 1 - t);
        }
        queries.give(out + at * stride + own, stride);
    }
}

}  // namespace
