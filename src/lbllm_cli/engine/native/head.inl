// The head, and plain reading of memory to compare with.

namespace {

// Two vectors of bfloat16 weights at even and odd places: as floats, without a shuffle.
inline v8f even_floats(v8u pairs) { return (v8f)(pairs << 16); }
inline v8f odd_floats(v8u pairs) { return (v8f)(pairs & 0xffff0000u); }

// Floats in the order that even_floats and odd_floats leave, n a multiple of 16.
inline void even_odd(const float* x, int n, float* to) {
    for (int i = 0; i < n; i++) to[i / 16 * 16 + (i % 2) * 8 + i % 16 / 2] = x[i];
}

constexpr int kHeadRows = 4;

// Products of rows of weights with one input, n columns in the order of even_odd. ahead: from a weight to that which is asked for
// before it is needed, of the rows that come next: within a row of 2,048 bytes it was the one beside it.
inline void head_rows(const uint16_t* const w[kHeadRows], const float* x, int n, int64_t ahead, float total[kHeadRows]) {
    v8f even[kHeadRows] = {}, odd[kHeadRows] = {};
    for (int c = 0; c < n; c += 16) {
        const v8f a = load<v8f>(x + c), b = load<v8f>(x + c + 8);
        for (int i = 0; i < kHeadRows; i++) {
            __builtin_prefetch(w[i] + c + ahead);
            const v8u pairs = load<v8u>(w[i] + c);
            even[i] = fused(even_floats(pairs), a, even[i]);
            odd[i] = fused(odd_floats(pairs), b, odd[i]);
        }
    }
    for (int i = 0; i < kHeadRows; i++) total[i] = sum(even[i] + odd[i]);
}

// Of float32 weights, in the order of the model.
inline void head_rows(const float* const w[kHeadRows], const float* x, int n, int64_t ahead, float total[kHeadRows]) {
    for (int i = 0; i < kHeadRows; i++) {
        v8f a = {}, b = {};
        for (int c = 0; c < n; c += 16) {
            __builtin_prefetch(w[i] + c + ahead);
            a = fused(load<v8f>(w[i] + c), load<v8f>(x + c), a);
            b = fused(load<v8f>(w[i] + c + 8), load<v8f>(x + c + 8), b);
        }
        total[i] = sum(a + b);
    }
}

// Of int8 weights, in the order of the model; without their scales.
inline void head_rows(const int8_t* const w[kHeadRows], const float* x, int n, int64_t ahead, float total[kHeadRows]) {
    Floats sums[kHeadRows][2] = {};
    const auto add = [&](int c, int which) {
        const Floats in = load<Floats>(x + c);
        for (int i = 0; i < kHeadRows; i++) sums[i][which] = fused((Floats)floats_of(w[i] + c), in, sums[i][which]);
    };
    int c = 0;
    for (; c + 2 * kLanes <= n; c += 2 * kLanes) {
        for (int i = 0; i < kHeadRows; i++) __builtin_prefetch(w[i] + c + ahead);
        add(c, 0);
        add(c + kLanes, 1);
    }
    for (; c < n; c += kLanes) add(c, 0);
    for (int i = 0; i < kHeadRows; i++) {
        const Floats both = sums[i][0] + sums[i][1];
        total[i] = 0.0f;
        for (int lane = 0; lane < kLanes; lane += 8) {
            v8f part;
            memcpy(&part, reinterpret_cast<const char*>(&both) + lane * 4, sizeof part);
            total[i] += sum(part);
        }
    }
}

inline float as_float(float x) { return x; }
inline float as_float(uint16_t bits) { return from_bfloat16(bits); }
inline float as_float(int8_t x) { return x; }

inline float from_half(uint16_t bits) {
    uint8_t eight[16] = {};
    memcpy(eight, &bits, 2);
    return halves(eight)[0];
}

// A row of an embedding as floats.
inline void read_row(const lbllm_rows& rows, int64_t row, int width, float* to) {
    if (rows.dtype != LBLLM_INT8) return read_floats(rows.weight, rows.dtype, row * width, width, to);
    const int8_t* from = static_cast<const int8_t*>(rows.weight) + row * width;
    const float scale = from_half(rows.scale[row]);
    for (int i = 0; i < width; i++) to[i] = scale * from[i];
}

// scale: of rows, or NULL. values: inputs [rows, in_features]; ordered: the same as head_rows reads whole vectors of them.
template <typename T>
void multiply_head(const T* weight, const uint16_t* scale, const float* values, const float* ordered, void* y, int in_features,
                   int64_t out_features, int dtype, int64_t rows, int threads) {
    const int whole = in_features / 16 * 16;
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t r = 0; r < out_features; r += kHeadRows) {
        const int n = static_cast<int>(smaller<int64_t>(kHeadRows, out_features - r));
        const T* w[kHeadRows];
        for (int i = 0; i < kHeadRows; i++) w[i] = weight + (r + smaller(i, n - 1)) * in_features;
        for (int64_t m = 0; m < rows; m++) {
            float total[8] = {};
            head_rows(w, ordered + m * in_features, whole, kHeadRows * static_cast<int64_t>(in_features), total);
            for (int i = 0; i < n; i++)
                for (int c = whole; c < in_features; c++) total[i] += as_float(w[i][c]) * values[m * in_features + c];
            for (int i = 0; scale && i < n; i++) total[i] *= from_half(scale[r + i]);
            write_floats(total, n, y, dtype, m * out_features + r);
        }
    }
}

void head(const lbllm_rows* weight, const void* x, void* y, int32_t in_features, int64_t out_features, int32_t dtype, int64_t rows,
          int32_t threads) {
    static thread_local Scratch<float> memory;
    float* values = memory.of(rows * 2 * in_features);
    float* ordered = values + rows * in_features;
    read_floats(x, dtype, 0, static_cast<int>(rows * in_features), values);
    threads = useful_threads(threads, in_features * out_features, kWeightsPerThread);
    if (weight->dtype == LBLLM_BFLOAT16) {
        const int whole = in_features / 16 * 16;
        for (int64_t m = 0; m < rows; m++) even_odd(values + m * in_features, whole, ordered + m * in_features);
        multiply_head(static_cast<const uint16_t*>(weight->weight), nullptr, values, ordered, y, in_features, out_features, dtype,
                      rows, threads);
    } else if (weight->dtype == LBLLM_INT8) {
        multiply_head(static_cast<const int8_t*>(weight->weight), weight->scale, values, values, y, in_features, out_features, dtype,
                      rows, threads);
    } else {
        multiply_head(static_cast<const float*>(weight->weight), nullptr, values, values, y, in_features, out_features, dtype, rows,
                      threads);
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
