// Quantizer, linear and head. Floats are added in one order per tier, so that a row's result depends neither on the other rows nor
// on the number of threads.

namespace {

using lbllm::Layout;

constexpr float kSmallestStep = 1e-30f;         // ops/actquant.py
constexpr float kShares[2] = {1.0f, 0.88f};     // ops/actquant.py
constexpr int64_t kWeightsPerThread = 1 << 17;  // of a linear, times rows
constexpr int64_t kValuesPerThread = 1 << 11;   // of a quantizer
constexpr int64_t kBlockRows = 128;             // rows whose sums stay in a core's cache
constexpr int kAhead = 2048;                    // bytes of weights asked for before they are needed: a tenth faster on cold ones
constexpr int kHeadAhead = 2048;                // weights of the head, likewise
constexpr int kDecodeFrom = 4;                  // rows from which decoding a group once pays

inline float reciprocal(float step) { return step > kSmallestStep ? 1.0f / step : 0.0f; }

// Lattice places 0..top of eight values. What is not a number gets place 0.
inline v8i places_of(const float* x, float inverse, int zero, int top) {
#if defined(__AVX2__)
    const __m256i place = _mm256_add_epi32(_mm256_cvtps_epi32((__m256)(load<v8f>(x) * all(inverse))), _mm256_set1_epi32(zero));
    return (v8i)_mm256_min_epi32(_mm256_max_epi32(place, _mm256_setzero_si256()), _mm256_set1_epi32(top));
#else
    // Held near the lattice first: `rounded` is right for small numbers only.
    const v8f near = minimum(maximum(load<v8f>(x) * all(inverse), all(-256.0f)), all(256.0f));
    const v8f place = rounded(near) + all(static_cast<float>(zero));
    return to_int(minimum(maximum(place, all(0.0f)), all(static_cast<float>(top))));
#endif
}

struct Fit {
    float step, error;
};

// The step that is best for n values x with given T - Z, and the squared error that it leaves.
inline Fit fit_step(const float* x, const int8_t* lattice, int n) {
    v8f product = {}, square = {};
    for (int i = 0; i < n; i += 8) {
        const v8f l = bytes(lattice + i);
        product = fused(load<v8f>(x + i), l, product);
        square = fused(l, l, square);
    }
    const float step = sum(product) / larger(1.0f, sum(square));
    v8f error = {};
    for (int i = 0; i < n; i += 8) {
        const v8f off = bytes(lattice + i) * all(step) - load<v8f>(x + i);
        error = fused(off, off, error);
    }
    return {step, sum(error)};
}

inline void nearest(const float* x, int n, float inverse, int zero, const int8_t* table, int top, int8_t* lattice) {
    for (int i = 0; i < n; i += 32) {
        v8i place[4];
        for (int k = 0; k < 4; k++) place[k] = places_of(x + i + 8 * k, inverse, zero, top);
        look_up(table, top, place, lattice + i);
    }
}

// A quantized group: T - Z of its values, the step, Z, and the table that it took.
struct Group {
    const int8_t* lattice;
    float step;
    int zero, table;
};

inline Group quantize_uniform(const lbllm_quantizer& q, const float* x, int n, float high, float low, int8_t* lattice) {
    const float down = low * q.clip[0][1], top = static_cast<float>(q.top[0]);
    const float inverse = reciprocal((high * q.clip[0][0] + down) / top);
    const int zero = static_cast<int>(minimum(maximum(rounded(all(down * inverse)), all(0.0f)), all(top))[0]);
    nearest(x, n, inverse, zero, q.lattice[0], q.top[0], lattice);
    for (int i = 0; i < n; i++) lattice[i] = static_cast<int8_t>(lattice[i] - zero);
    return {lattice, fit_step(x, lattice, n).step, zero, 0};
}

// Quantizes n values, a multiple of 32 with zeros behind a ragged end. lattice: room for 2 n.
inline Group quantize_group(const lbllm_quantizer& q, const float* x, int n, int8_t* lattice) {
    v8f up = {}, down = {};
    for (int i = 0; i < n; i += 8) {
        up = maximum(up, load<v8f>(x + i));
        down = maximum(down, -load<v8f>(x + i));
    }
    const float high = largest(up), low = largest(down);
    if (q.tables == 0) return quantize_uniform(q, x, n, high, low, lattice);
    Group best{nullptr, 0.0f, 0, 0};
    int8_t* tried = lattice;
    float least = 0.0f;
    for (int t = 0; t < q.tables; t++) {
        const float below = static_cast<float>(q.zero[t]), above = static_cast<float>(q.top[t]) - below;
        float reach = above > 0.0f ? high * (q.clip[t][0] / above) : 0.0f;
        if (below > 0.0f) reach = larger(reach, low * (q.clip[t][1] / below));
        for (const float share : kShares) {
            nearest(x, n, reciprocal(reach * share), q.zero[t], q.lattice[t], q.top[t], tried);
            const Fit fit = fit_step(x, tried, n);
            if (best.lattice && !(fit.error < least)) continue;
            best = {tried, fit.step, q.zero[t], t};
            least = fit.error;
            tried = tried == lattice ? lattice + n : lattice;
        }
    }
    return best;
}

inline int padded(int n) { return (n + 31) & ~31; }

inline void write_places(const Group& group, int from, int n, uint8_t* to) {
    for (int i = 0; i < n; i++) to[i] = static_cast<uint8_t>(group.lattice[from + i] + group.zero);
}

// Inputs as the dot products read them: places [groups][rows rounded up][l.input], step and Z [groups][rows].
struct Quantized {
    uint8_t* places;
    float* steps;
    float* zeros;
    int64_t rows, stride;  // rows, and rows with those that fill the last block of kTokens

    void prepare(const Layout& l, int64_t count) {
        static thread_local Scratch<uint8_t> bytes;
        static thread_local Scratch<float> floats;
        rows = count;
        stride = lbllm::ceil_div(count, kTokens) * kTokens;
        places = bytes.of(l.groups * stride * l.input);
        steps = floats.of(2 * l.groups * count);
        zeros = steps + l.groups * count;
    }

    uint8_t* at(const Layout& l, int g, int64_t row) const { return places + (g * stride + row) * l.input; }
};

// One step's worth of a row's values: group `from` of the weights, or the whole row.
inline void quantize_into(const lbllm_quantizer& q, const Layout& l, const float* x, int64_t row, int from, const Quantized& to) {
    static thread_local Scratch<float> floats;
    static thread_local Scratch<int8_t> codes;
    const bool whole = q.size >= l.in;
    const int start = whole ? 0 : from * l.group, n = whole ? l.in : l.columns(from);
    float* values = floats.of(padded(n));
    memcpy(values, x + start, static_cast<size_t>(n) * 4);
    fill(values + n, values + padded(n), 0.0f);
    const Group found = quantize_group(q, values, padded(n), codes.of(2 * padded(n)));
    for (int g = whole ? 0 : from; g < (whole ? l.groups : from + 1); g++) {
        uint8_t* places = to.at(l, g, row);
        write_places(found, whole ? g * l.group : 0, l.columns(g), places);
        memset(places + l.columns(g), 0, static_cast<size_t>(l.input - l.columns(g)));
        to.steps[g * to.rows + row] = found.step;
        to.zeros[g * to.rows + row] = static_cast<float>(found.zero);
    }
}

// Rows of float32 or bfloat16 values, quantized.
inline void quantize_rows(const lbllm_quantizer& q, const Layout& l, const void* x, int dtype, const Quantized& to, int threads) {
    const int per_row = q.size >= l.in ? 1 : l.groups;
    const int64_t tasks = to.rows * per_row;
    threads = useful_threads(threads, to.rows * l.in, kValuesPerThread);
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t task = 0; task < tasks; task++) {
        static thread_local Scratch<float> memory;
        const int64_t row = task / per_row;
        const int g = static_cast<int>(task % per_row);
        const float* values = static_cast<const float*>(x) + row * l.in;
        if (dtype != LBLLM_FLOAT32) {
            float* wide = memory.of(l.in);
            const int start = per_row == 1 ? 0 : g * l.group, n = per_row == 1 ? l.in : l.columns(g);
            read_floats(x, dtype, row * l.in + start, n, wide + start);
            values = wide;
        }
        quantize_into(q, l, values, row, g, to);
    }
}

// Adds a group's share of eight outputs: d * scale * (dot - Z * sum of levels). Every term in brackets is an exact integer.
inline v8f add_group(v8f y, v8i dot, const uint8_t* record, float step, float zero) {
    const v8f exact = to_float(dot) - all(zero) * shorts(record + lbllm::kSums);
    return fused(exact, halves(record) * all(step), y);
}

// Eight outputs of few rows, each group's codes looked up anew for each: they stay in the nearest cache. kChunks: of a group that
// is not the last; 0: any number.
template <int kSafe, int kChunks>
void tile_few(const Layout& l, const uint8_t* record, const Quantized& x, int64_t first, int64_t count, v8f* y) {
    for (int64_t m = 0; m < count; m++) y[m] = v8f{};
    for (int g = 0; g < l.groups; record += l.record, g++) {
        const uint8_t* codes = record + lbllm::kCodes;
        const int8_t* levels = reinterpret_cast<const int8_t*>(record + lbllm::kLevelTable);
        for (int line = 0; line < l.record; line += 64) __builtin_prefetch(record + kAhead + line);
        const int64_t at = g * x.rows + first;
        const uint8_t* in = x.at(l, g, first);
        for (int64_t m = 0; m < count; m++, in += l.input) {
            const v8i dot = l.chunks(g) == kChunks ? dots<kSafe, kChunks>(codes, levels, in, kChunks)
                                                   : dots<kSafe, 0>(codes, levels, in, l.chunks(g));
            y[m] = add_group(y[m], dot, record, x.steps[at + m], x.zeros[at + m]);
        }
    }
}

// Eight outputs of many rows: a group is decoded once for all.
template <int kSafe>
void tile_many(const Layout& l, const uint8_t* record, const Quantized& x, int64_t first, int64_t count, v8f* y) {
    static thread_local Scratch<int8_t> memory;
    int8_t* decoded = memory.of(l.input * lbllm::kRows);
    for (int64_t m = 0; m < count; m++) y[m] = v8f{};
    for (int g = 0; g < l.groups; record += l.record, g++) {
        decode(record + lbllm::kCodes, reinterpret_cast<const int8_t*>(record + lbllm::kLevelTable), l.chunks(g), decoded);
        const int64_t at = g * x.rows + first;
        const uint8_t* in = x.at(l, g, first);
        for (int64_t m = 0; m < count; m += kTokens) {
            v8i dot[kTokens];
            dots_decoded<kSafe>(decoded, in + m * l.input, l.input, l.chunks(g), dot);
            for (int64_t t = 0; t < kTokens && m + t < count; t++)
                y[m + t] = add_group(y[m + t], dot[t], record, x.steps[at + m + t], x.zeros[at + m + t]);
        }
    }
}

template <int kSafe>
void tile_rows(const Layout& l, const uint8_t* tile, const Quantized& x, int64_t first, int64_t count, v8f* y) {
    if (count >= kDecodeFrom) return tile_many<kSafe>(l, tile, x, first, count, y);
    if (l.full_chunks == 1) return tile_few<kSafe, 1>(l, tile, x, first, count, y);
    if (l.full_chunks == 2) return tile_few<kSafe, 2>(l, tile, x, first, count, y);
    tile_few<kSafe, 0>(l, tile, x, first, count, y);
}

// Sums of rows first .. first + count of a tile, with biases, to y.
void write_tile(const lbllm_weights& w, int64_t tile, const v8f* sums, int64_t first, int64_t count, void* y, int dtype) {
    const int n = static_cast<int>(smaller<int64_t>(lbllm::kRows, w.out_features - tile * lbllm::kRows));
    for (int64_t m = 0; m < count; m++) {
        float row[8];
        for (int i = 0; i < n; i++) row[i] = sums[m][lbllm::place_of(i)] + (w.bias ? w.bias[tile * lbllm::kRows + i] : 0.0f);
        write_floats(row, n, y, dtype, (first + m) * w.out_features + tile * lbllm::kRows);
    }
}

template <int kSafe>
void multiply(const lbllm_weights& w, const Quantized& x, void* y, int dtype, int threads) {
    const Layout l(w.in_features, w.out_features, w.group_size);
    threads = useful_threads(threads, static_cast<int64_t>(w.in_features) * w.out_features * x.rows, kWeightsPerThread);
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t t = 0; t < l.tiles; t++) {
        alignas(64) v8f out[kBlockRows];
        for (int64_t first = 0; first < x.rows; first += kBlockRows) {
            const int64_t count = smaller(kBlockRows, x.rows - first);
            tile_rows<kSafe>(l, w.tiles + t * l.tile, x, first, count, out);
            write_tile(w, t, out, first, count, y, dtype);
        }
    }
}

// y = quantized x times the weights; x was quantized by q.
void apply(const lbllm_weights& w, const lbllm_quantizer& q, const Quantized& x, void* y, int dtype, int threads) {
    const int top = larger(q.top[0], q.tables > 1 ? q.top[1] : 0);
    (top <= 31 ? multiply<4> : top <= 63 ? multiply<2> : multiply<1>)(w, x, y, dtype, threads);
}

// A group's weights, level times scale, as floats [chunks][4][8][16]; exact, 7 times 11 bits.
inline void weights_of(const uint8_t* record, int chunks, int8_t* decoded, float* out) {
    decode(record + lbllm::kCodes, reinterpret_cast<const int8_t*>(record + lbllm::kLevelTable), chunks, decoded);
    const v8f scales = halves(record);
    for (int i = 0; i < chunks * 64; i++) {
        const v8f scale = all(scales[lbllm::place_of(i / 2 % 8)]);
        store(out + i * 8, bytes(decoded + i * 8) * scale);
    }
}

// Eight outputs of rows of inputs in full precision, [groups][rows][l.input] with zeros where a group is padded: of a row after the
// other, columns of equal place would fall into the same lines of the nearest cache.
void tile_full(const Layout& l, const uint8_t* record, const float* x, int64_t rows, int64_t count, v8f* y) {
    static thread_local Scratch<int8_t> codes;
    static thread_local Scratch<float> floats;
    int8_t* decoded = codes.of(l.input * lbllm::kRows);
    float* weights = floats.of(l.input * lbllm::kRows + count * 64);
    float* parts = weights + l.input * lbllm::kRows;  // of each input and output row, eight yet to be added
    fill(parts, parts + count * 64, 0.0f);
    for (int g = 0; g < l.groups; record += l.record, g++) {
        weights_of(record, l.chunks(g), decoded, weights);
        for (int64_t m = 0; m < count; m++) {
            const float* in = x + (g * rows + m) * l.input;
            v8f row[8];
            for (int r = 0; r < 8; r++) row[r] = load<v8f>(parts + m * 64 + r * 8);
            for (int unit = 0; unit < l.chunks(g) * 4; unit++) {
                const v8f a = load<v8f>(in + unit * 16), b = load<v8f>(in + unit * 16 + 8);
                const float* w = weights + unit * 128;
                for (int r = 0; r < 8; r++) row[r] = fused(load<v8f>(w + r * 16 + 8), b, fused(load<v8f>(w + r * 16), a, row[r]));
            }
            for (int r = 0; r < 8; r++) store(parts + m * 64 + r * 8, row[r]);
        }
    }
    for (int64_t m = 0; m < count; m++)
        for (int r = 0; r < 8; r++) y[m][lbllm::place_of(r)] = sum(load<v8f>(parts + m * 64 + r * 8));
}

void linear_full(const lbllm_weights& w, const void* x, void* y, int dtype, int64_t rows, int threads) {
    static thread_local Scratch<float> memory;
    const Layout l(w.in_features, w.out_features, w.group_size);
    float* in = memory.of(rows * l.groups * l.input);
    fill(in, in + rows * l.groups * l.input, 0.0f);
    for (int64_t m = 0; m < rows; m++)
        for (int g = 0; g < l.groups; g++)
            read_floats(x, dtype, m * l.in + g * l.group, l.columns(g), in + (g * rows + m) * l.input);
    threads = useful_threads(threads, static_cast<int64_t>(w.in_features) * w.out_features * rows, kWeightsPerThread);
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t t = 0; t < l.tiles; t++) {
        alignas(64) v8f out[kBlockRows];
        for (int64_t first = 0; first < rows; first += kBlockRows) {
            const int64_t count = smaller(kBlockRows, rows - first);
            tile_full(l, w.tiles + t * l.tile, in + first * l.input, rows, count, out);
            write_tile(w, t, out, first, count, y, dtype);
        }
    }
}

void linear(const lbllm_weights* weights, const lbllm_quantizer* quantizer, const void* x, void* y, int32_t dtype, int64_t rows,
            int32_t threads) {
    if (!quantizer) return linear_full(*weights, x, y, dtype, rows, threads);
    const Layout l(weights->in_features, weights->out_features, weights->group_size);
    Quantized quantized;
    quantized.prepare(l, rows);
    quantize_rows(*quantizer, l, x, dtype, quantized, threads);
    apply(*weights, *quantizer, quantized, y, dtype, threads);
}

void quantize(const lbllm_quantizer* quantizer, const void* x, int32_t dtype, int64_t rows, int32_t width, uint8_t* places,
              float* steps, int32_t* zeros) {
    const int size = smaller(quantizer->size, width);
    const int64_t groups = lbllm::ceil_div(width, size);
    Scratch<float> floats;
    Scratch<int8_t> codes;
    float* values = floats.of(padded(size));
    for (int64_t at = 0; at < rows * groups; at++) {
        const int start = static_cast<int>(at % groups) * size, n = smaller(size, width - start);
        fill(values, values + padded(size), 0.0f);
        read_floats(x, dtype, at / groups * width + start, n, values);
        const Group found = quantize_group(*quantizer, values, padded(n), codes.of(2 * padded(n)));
        write_places(found, 0, n, places + at / groups * width + start);
        steps[at] = found.step;
        zeros[at] = found.zero;
    }
}

// Two vectors of bfloat16 weights at even and odd places: as floats, without a shuffle.
inline v8f even_floats(v8u pairs) { return (v8f)(pairs << 16); }
inline v8f odd_floats(v8u pairs) { return (v8f)(pairs & 0xffff0000u); }

// Places of 16 floats in the order that even_floats and odd_floats leave; zeros behind n.
inline void even_odd(const float* x, int n, float* to) {
    for (int i = 0; i < n; i++) to[i / 16 * 16 + (i % 2) * 8 + i % 16 / 2] = x[i];
}

constexpr int kHeadRows = 4;

// Products of rows of weights with one input, n columns in the order of even_odd.
inline void head_rows(const uint16_t* const w[kHeadRows], const float* x, int n, float total[kHeadRows]) {
    v8f even[kHeadRows] = {}, odd[kHeadRows] = {};
    for (int c = 0; c < n; c += 16) {
        const v8f a = load<v8f>(x + c), b = load<v8f>(x + c + 8);
        for (int i = 0; i < kHeadRows; i++) {
            __builtin_prefetch(w[i] + c + kHeadAhead);
            const v8u pairs = load<v8u>(w[i] + c);
            even[i] = fused(even_floats(pairs), a, even[i]);
            odd[i] = fused(odd_floats(pairs), b, odd[i]);
        }
    }
    for (int i = 0; i < kHeadRows; i++) total[i] = sum(even[i] + odd[i]);
}

void head(const uint16_t* weight, const void* x, void* y, int32_t in_features, int64_t out_features, int32_t dtype, int64_t rows,
          int32_t threads) {
    const int whole = in_features / 16 * 16;
    Scratch<float> memory;
    float* values = memory.of(rows * 2 * in_features);
    float* ordered = values + rows * in_features;
    read_floats(x, dtype, 0, static_cast<int>(rows * in_features), values);
    for (int64_t m = 0; m < rows; m++) even_odd(values + m * in_features, whole, ordered + m * in_features);
    threads = useful_threads(threads, in_features * out_features, kWeightsPerThread);
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t r = 0; r < out_features; r += kHeadRows) {
        const int n = static_cast<int>(smaller<int64_t>(kHeadRows, out_features - r));
        const uint16_t* w[kHeadRows];
        for (int i = 0; i < kHeadRows; i++) w[i] = weight + (r + smaller(i, n - 1)) * in_features;
        for (int64_t m = 0; m < rows; m++) {
            float total[8] = {};
            head_rows(w, ordered + m * in_features, whole, total);
            for (int i = 0; i < n; i++)
                for (int c = whole; c < in_features; c++) total[i] += from_bfloat16(w[i][c]) * values[m * in_features + c];
            write_floats(total, n, y, dtype, m * out_features + r);
        }
    }
}

uint64_t read(const uint8_t* data, int64_t bytes, int32_t threads) {
    uint64_t total = 0;
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : total)
    for (int64_t at = 0; at < bytes / 4096; at++) {
        v8u a = {}, b = {}, c = {}, d = {};
        for (const uint8_t* p = data + at * 4096; p < data + at * 4096 + 4096; p += 128) {
            a += load<v8u>(p);
            b += load<v8u>(p + 32);
            c += load<v8u>(p + 64);
            d += load<v8u>(p + 96);
        }
        const v8u all_of = (a + b) + (c + d);
        for (int i = 0; i < 8; i++) total += all_of[i];
    }
    return total;
}

}  // namespace
