// The activation quantizer of format/activations.py, and inputs laid out for the dot products.

namespace {

using lbllm::Layout;

constexpr float kSmallestStep = 1e-30f;        // format/activations.py
constexpr float kShares[2] = {1.0f, 0.88f};    // format/activations.py
constexpr int64_t kValuesPerThread = 1 << 11;

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

// Inputs as the dot products read them: places [groups][rows rounded up][l.input], step and Z [groups * parts][rows].
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
        steps = floats.of(2 * l.groups * l.parts * count);
        zeros = steps + l.groups * l.parts * count;
    }

    uint8_t* at(const Layout& l, int g, int64_t row) const { return places + (g * stride + row) * l.input; }
};

// One step's worth of a row's values: step `from`, or the whole row.
inline void quantize_into(const lbllm_quantizer& q, const Layout& l, const void* x, int dtype, int64_t row, int from,
                          const Quantized& to) {
    static thread_local Scratch<float> floats;
    static thread_local Scratch<int8_t> codes;
    const bool whole = q.size >= l.in;
    const int start = whole ? 0 : from * l.step, n = whole ? l.in : l.columns_of_step(from), steps = l.steps();
    float* values = floats.of(padded(n));
    read_floats(x, dtype, row * l.in + start, n, values);
    fill(values + n, values + padded(n), 0.0f);
    const Group found = quantize_group(q, values, padded(n), codes.of(2 * padded(n)));
    for (int s = whole ? 0 : from; s < (whole ? steps : from + 1); s++) {
        const int columns = l.columns_of_step(s), before = s % l.parts * l.step;
        uint8_t* places = to.at(l, s / l.parts, row) + before;
        write_places(found, whole ? s * l.step : 0, columns, places);
        to.steps[s * to.rows + row] = found.step;
        to.zeros[s * to.rows + row] = static_cast<float>(found.zero);
        if (l.parts > 1 && s + 1 < steps) continue;
        memset(places + columns, 0, static_cast<size_t>(l.input - before - columns));
        for (int missing = s + 1; missing % l.parts; missing++) to.steps[missing * to.rows + row] = to.zeros[missing * to.rows + row] = 0;
    }
}

// Rows of float32 or bfloat16 values, quantized.
inline void quantize_rows(const lbllm_quantizer& q, const Layout& l, const void* x, int dtype, const Quantized& to, int threads) {
    const int per_row = q.size >= l.in ? 1 : l.steps();
    const int64_t tasks = to.rows * per_row;
    threads = useful_threads(threads, to.rows * l.in, kValuesPerThread);
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t task = 0; task < tasks; task++)
        quantize_into(q, l, x, dtype, task / per_row, static_cast<int>(task % per_row), to);
}

inline float rounded_step(float step, int dtype) {
    return dtype == LBLLM_BFLOAT16 ? from_bfloat16(to_bfloat16(step)) : step;
}

// A group of n values from x[first] on. values: room for its own, with zeros behind a ragged end.
inline Group quantize_at(const lbllm_quantizer& q, const void* x, int dtype, int64_t first, int n, float* values) {
    static thread_local Scratch<int8_t> codes;
    fill(values + n, values + padded(n), 0.0f);
    read_floats(x, dtype, first, n, values);
    return quantize_group(q, values, padded(n), codes.of(2 * padded(n)));
}

void quantize(const lbllm_quantizer* quantizer, const void* x, int32_t dtype, int64_t rows, int32_t width, uint8_t* places,
              float* values, float* steps, int32_t* zeros, int32_t* tables, int32_t step_dtype, int32_t threads) {
    const int size = smaller(quantizer->size, width);
    const int64_t groups = lbllm::ceil_div(width, size);
    threads = useful_threads(threads, rows * width, kValuesPerThread);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t at = 0; at < rows * groups; at++) {
        static thread_local Scratch<float> floats;
        float* own = floats.of(padded(size));
        const int start = static_cast<int>(at % groups) * size, n = smaller(size, width - start);
        const int64_t first = at / groups * width + start;
        const Group found = quantize_at(*quantizer, x, dtype, first, n, own);
        steps[at] = rounded_step(found.step, step_dtype);
        zeros[at] = found.zero;
        tables[at] = found.table;
        if (places) write_places(found, 0, n, places + first);
        if (!values) continue;
        for (int i = 0; i < padded(n); i += 8) store(own + i, bytes(found.lattice + i) * all(steps[at]));
        memcpy(values + first, own, static_cast<size_t>(n) * 4);
    }
}

inline v8f kept(v8i mask, v8f x) { return (v8f)(mask & (v8i)x); }

struct Sums {
    float inner, over, under;
};

// One group's gradient, in place, and its sums: n values x and what they became. top: largest lattice place of the table.
inline Sums passed_on(const float* x, const float* values, float* gradient, int n, float step, int zero, int top) {
    // Half a step beyond the outermost level still rounds to it.
    const v8f inverse = all(reciprocal(step)), from = all(static_cast<float>(zero)), most = all(static_cast<float>(top) + 0.5f);
    v8f inner = {}, over = {}, under = {};
    for (int i = 0; i < n; i += 8) {
        const v8f own = load<v8f>(x + i), value = load<v8f>(values + i), grad = load<v8f>(gradient + i);
        const v8f place = own * inverse + from;
        const v8i above = (v8i)(place > most), below = (v8i)(place < all(-0.5f));
        const v8f passed = kept(~(above | below), grad);
        inner = fused(passed, value - own, inner);
        over = fused(kept(above, grad), value, over);
        under = fused(kept(below, grad), value, under);
        store(gradient + i, passed);
    }
    return {sum(inner), sum(over), sum(under)};
}

void quantize_backward(const lbllm_quantizer* quantizer, const void* x, int32_t dtype, int64_t groups, const float* values,
                       const float* steps, const int32_t* zeros, const int32_t* tables, const float* gradient, float* inputs,
                       float* sums, int32_t threads) {
    const int n = quantizer->size, room = padded(n);
    const size_t bytes_of_group = static_cast<size_t>(n) * 4;
    threads = useful_threads(threads, groups * n, kValuesPerThread);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t at = 0; at < groups; at++) {
        static thread_local Scratch<float> floats;
        float *own = floats.of(3 * room), *value = own + room, *grad = value + room;
        for (float* part = own; part <= grad; part += room) fill(part + n, part + room, 0.0f);
        read_floats(x, dtype, at * n, n, own);
        memcpy(value, values + at * n, bytes_of_group);
        memcpy(grad, gradient + at * n, bytes_of_group);
        const Sums found = passed_on(own, value, grad, room, steps[at], zeros[at], quantizer->top[tables[at]]);
        if (inputs) memcpy(inputs + at * n, grad, bytes_of_group);
        if (!sums) continue;
        sums[3 * at] = found.inner;
        sums[3 * at + 1] = found.over;
        sums[3 * at + 2] = found.under;
    }
}

}  // namespace
