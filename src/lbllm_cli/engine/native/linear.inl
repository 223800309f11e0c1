// Linears. Floats are added in one order per tier, so that a row's result depends neither on the other rows nor on the number of
// threads.

namespace {

constexpr int64_t kInputRows = 1024;  // rows whose inputs are laid out at once, whatever the length of a prompt
constexpr int kAhead = 2048;          // bytes of weights asked for before they are needed: a tenth faster on cold ones
constexpr int kDecodeFrom = 4;        // rows from which decoding a group once pays

// Adds a part's share of eight outputs: d * scale * (dot - Z * sum of levels). Every term in brackets is an exact integer.
inline v8f add_part(v8f y, v8i dot, const uint8_t* record, int part, float step, float zero) {
    const v8f exact = to_float(dot) - all(zero) * shorts(record + Layout::sums_at(part));
    return fused(exact, halves(record) * all(step), y);
}

// Eight outputs of few rows, each group's codes looked up anew for each: they stay in the nearest cache. kChunks: of a group that
// is not the last; 0: any number.
template <int kSafe, int kChunks, bool kPlaced>
void tile_few(const Layout& l, const uint8_t* record, const Quantized& x, v8f* y) {
    for (int64_t m = 0; m < x.rows; m++) y[m] = v8f{};
    for (int g = 0; g < l.groups; record += l.record, g++) {
        const uint8_t* codes = record + l.codes(g);
        const uint8_t* levels = record + lbllm::kLevelTable;
        for (int line = 0; line < l.record; line += 64) __builtin_prefetch(record + kAhead + line);
        const int64_t at = g * x.rows;
        const uint8_t* in = x.at(l, g, 0);
        for (int64_t m = 0; m < x.rows; m++, in += l.input) {
            const v8i dot = l.chunks(g) == kChunks ? dots<kSafe, kChunks, kPlaced>(codes, levels, in, kChunks)
                                                   : dots<kSafe, 0, kPlaced>(codes, levels, in, l.chunks(g));
            y[m] = add_part(y[m], dot, record, 0, x.steps[at + m], x.zeros[at + m]);
        }
    }
}

// The same where groups, of one chunk, have several parts.
template <int kSafe, int kParts>
void tile_of_parts(const Layout& l, const uint8_t* record, const Quantized& x, v8f* y) {
    for (int64_t m = 0; m < x.rows; m++) y[m] = v8f{};
    for (int g = 0; g < l.groups; record += l.record, g++) {
        const uint8_t *codes = record + l.codes_at(1), *levels = record + lbllm::kLevelTable;
        for (int line = 0; line < l.record; line += 64) __builtin_prefetch(record + kAhead + line);
        const uint8_t* in = x.at(l, g, 0);
        for (int64_t m = 0; m < x.rows; m++, in += l.input) {
            v8i dot[kParts];
            dots_of_parts<kSafe, kParts>(codes, levels, in, dot);
            for (int part = 0; part < kParts; part++) {
                const int64_t at = (g * kParts + part) * x.rows + m;
                y[m] = add_part(y[m], dot[part], record, part, x.steps[at], x.zeros[at]);
            }
        }
    }
}

template <int kSafe, bool kPlaced>
void tile_rows(const Layout& l, const uint8_t* tile, const Quantized& x, v8f* y) {
    if (kPlaced && l.parts == 2) return tile_of_parts<kSafe, 2>(l, tile, x, y);
    if (kPlaced && l.parts == 4) return tile_of_parts<kSafe, 4>(l, tile, x, y);
    if (l.full_chunks == 1) return tile_few<kSafe, 1, kPlaced>(l, tile, x, y);
    if (l.full_chunks == 2) return tile_few<kSafe, 2, kPlaced>(l, tile, x, y);
    tile_few<kSafe, 0, kPlaced>(l, tile, x, y);
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
    const Layout l(w.in_features, w.out_features, w.group_size, w.level_group);
    threads = useful_threads(threads, static_cast<int64_t>(w.in_features) * w.out_features * x.rows, kWeightsPerThread);
    if (x.rows >= kDecodeFrom) return multiply_panels<kSafe>(w, l, x, y, dtype, threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t t = 0; t < l.tiles; t++) {
        v8f out[kDecodeFrom];
        (l.placed ? tile_rows<kSafe, true> : tile_rows<kSafe, false>)(l, w.tiles + t * l.tile, x, out);
        write_tile(w, t, out, 0, x.rows, y, dtype);
    }
}

// y = quantized x times the weights; x was quantized by q.
void apply(const lbllm_weights& w, const lbllm_quantizer& q, const Quantized& x, void* y, int dtype, int threads) {
    const int top = larger(q.top[0], q.tables > 1 ? q.top[1] : 0);
    (top <= 31 ? multiply<4> : top <= 63 ? multiply<2> : multiply<1>)(w, x, y, dtype, threads);
}

// A group's weights, level times scale, as floats [chunks][4][8][16]; exact, 7 times 11 bits.
inline void weights_of(const Layout& l, const uint8_t* record, int chunks, int8_t* decoded, float* out) {
    decode_record(l, record, chunks, decoded);
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
        weights_of(l, record, l.chunks(g), decoded, weights);
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
    const Layout l(w.in_features, w.out_features, w.group_size, w.level_group);
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

// y [rows, out] = x [rows, in], quantized by q or as it is where q is NULL, times the weights.
void project(const lbllm_weights& w, const lbllm_quantizer* q, const void* x, void* y, int dtype, int64_t rows, int threads) {
    const Layout l(w.in_features, w.out_features, w.group_size, w.level_group);
    const int64_t size = dtype == LBLLM_FLOAT32 ? 4 : 2;
    for (int64_t first = 0; first < rows; first += kInputRows) {
        const int64_t count = smaller(kInputRows, rows - first);
        const void* in = static_cast<const uint8_t*>(x) + first * l.in * size;
        void* out = static_cast<uint8_t*>(y) + first * l.out * size;
        if (!q) {
            linear_full(w, in, out, dtype, count, threads);
            continue;
        }
        Quantized quantized;
        quantized.prepare(l, count);
        quantize_rows(*q, l, in, dtype, quantized, threads);
        apply(w, *q, quantized, out, dtype, threads);
    }
}

void linear(const lbllm_weights* weights, const lbllm_quantizer* quantizer, const void* x, void* y, int32_t dtype, int64_t rows,
            int32_t threads) {
    project(*weights, quantizer, x, y, dtype, rows, threads);
}

}  // namespace
