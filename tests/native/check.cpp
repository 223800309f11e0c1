// The library's C interface against plain loops in double, for every tier that this processor has. Built with sanitizers by
// test_native.py. Prints one line per tier and one per failure; exits 1 on a failure, 77 where no tier runs.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include "lbllm_kernels.h"

namespace {

using std::vector;

int failures = 0;

void expect(bool good, const char* what, const char* about, double found, double limit) {
    if (good) return;
    failures++;
    printf("FAILED %s, %s, tier %s: %g, limit %g\n", what, about, lbllm_tier(), found, limit);
}

uint64_t state = 1;

uint32_t next() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<uint32_t>(state >> 33);
}

int below(int n) { return static_cast<int>(next() % static_cast<uint32_t>(n)); }
double uniform() { return (next() + 0.5) / 2147483648.0; }
float normal() { return static_cast<float>(sqrt(-2 * log(uniform())) * cos(6.283185307179586 * uniform())); }

vector<float> normals(size_t n, float scale = 1.0f) {
    vector<float> x(n);
    for (float& value : x) value = scale * normal();
    return x;
}

double of_bfloat16(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    memcpy(&x, &wide, 4);
    return x;
}

uint16_t bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

double of_half(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    return exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
}

// Exactly `count` elements, so that a sanitizer sees whoever reads beyond; the first begins a cache line.
template <typename T>
struct Aligned {
    T* data = nullptr;
    explicit Aligned(size_t count) {
        if (posix_memalign(reinterpret_cast<void**>(&data), 64, std::max<size_t>(1, count * sizeof(T)))) abort();
    }
    Aligned(const Aligned&) = delete;
    ~Aligned() { free(data); }
};

lbllm_quantizer quantizer(const vector<vector<int>>& tables, const vector<int>& zeros, int size, int bits = 4) {
    lbllm_quantizer q;
    memset(&q, 0, sizeof q);
    q.tables = static_cast<int32_t>(zeros.size());
    q.size = size;
    for (size_t t = 0; t < tables.size(); t++) {
        const vector<int>& levels = tables[t];
        const int zero = zeros.empty() ? 0 : zeros[t];
        q.top[t] = levels.back();
        q.zero[t] = zero;
        q.clip[t][0] = q.clip[t][1] = 1.0f;
        for (int place = 0; place <= levels.back(); place++) {
            size_t code = 0;
            for (size_t k = 1; k < levels.size(); k++)
                if (abs(levels[k] - place) < abs(levels[code] - place)) code = k;
            q.lattice[t][place] = static_cast<int8_t>(levels[code] - zero);
            q.code[t][place] = static_cast<uint8_t>(code);
        }
        for (size_t k = 0; bits == 4 && k < 16; k++) q.value[t][k] = static_cast<int8_t>(levels[k] - zero);
    }
    return q;
}

vector<int> knee(int fine_low, int fine_high, int coarse_low, int coarse_high, int ratio, int* zero) {
    *zero = fine_low + ratio * coarse_low;
    vector<int> levels;
    for (int k = coarse_low; k > 0; k--) levels.push_back(*zero - fine_low - ratio * k);
    for (int k = -fine_low; k <= fine_high; k++) levels.push_back(*zero + k);
    for (int k = 1; k <= coarse_high; k++) levels.push_back(*zero + fine_high + ratio * k);
    return levels;
}

constexpr int kFull = 6;  // the kind that is none: inputs in full precision

// kind 0, 1, 2: two tables of which the larger reaches at most 31, 63 and 127; 3: one table; 4: uniform; 5: uniform of 7 bits.
lbllm_quantizer any_quantizer(int kind, int size) {
    int za, zb;
    const vector<int> a = knee(5, 6, 2, 2, 3, &za), b = knee(3, 4, 4, 4, kind == 0 ? 3 : kind == 1 ? 6 : 14, &zb);
    if (kind == 3) return quantizer({b}, {zb}, size);
    if (kind >= 4) {
        vector<int> levels(kind == 4 ? 16 : 128);
        for (size_t i = 0; i < levels.size(); i++) levels[i] = static_cast<int>(i);
        return quantizer({levels}, {}, size, kind == 4 ? 4 : 7);
    }
    return quantizer({a, b}, {za, zb}, size);
}

struct Linear {
    int in, out, step, group, groups;
    vector<uint8_t> weight;
    vector<int8_t> levels;
    vector<uint16_t> scale;
    vector<float> bias;
    Aligned<uint8_t> tiles;
    lbllm_weights w;

    // level_group: as in lbllm_weights.
    Linear(int in_, int out_, int group_, bool biased, double size = 1.0, int level_group = 0)
        : in(in_), out(out_), step(group_), group(level_group ? level_group : group_), groups((in + group - 1) / group), weight(static_cast<size_t>(out) * groups * group / 4),
          levels(static_cast<size_t>(out) * groups * 4), scale(static_cast<size_t>(out) * groups),
          tiles(static_cast<size_t>(lbllm_tiles_bytes(in, out, step, level_group))) {
        for (int r = 0; r < out; r++)
            for (int c = 0; c < in; c++) weight[at(r, c)] |= static_cast<uint8_t>(below(4) << (c % group % 4 * 2));
        for (int8_t& level : levels) level = static_cast<int8_t>(below(4) ? below(255) - 127 : below(2) ? 127 : -127);
        // 2^-7 times 1 .. 2, a subnormal among them.
        for (uint16_t& s : scale) s = below(30) ? static_cast<uint16_t>((8 + static_cast<int>(log2(size))) << 10 | below(1024)) : 3;
        // Means and half-widths of the inner and of the outer pair; those of negative means as well.
        const int mean[8][2] = {{-1, 3}, {5, 2}, {3, 9}, {9, 8}, {7, 17}, {13, 14}, {13, 28}, {19, 23}};
        const int half[16][2] = {{7, 23},  {7, 26},  {10, 29}, {8, 31},  {12, 33}, {9, 35},  {12, 38}, {9, 41},
                                 {15, 41}, {11, 45}, {15, 48}, {11, 51}, {17, 55}, {13, 60}, {17, 72}, {15, 99}};
        for (size_t i = 0; level_group && i < levels.size(); i += 4) {
            const int means = below(8), halves = below(16), sign = below(2) ? 1 : -1;
            for (size_t k = 0; k < 4; k++)
                levels[i + k] = static_cast<int8_t>(sign * mean[means][k / 2] + (k % 2 ? 1 : -1) * half[halves][k / 2]);
        }
        for (size_t i = 0; level_group && i < scale.size(); i++) scale[i] = scale[i / static_cast<size_t>(groups) * static_cast<size_t>(groups)];
        if (biased) bias = normals(static_cast<size_t>(out));
        lbllm_pack(weight.data(), levels.data(), scale.data(), in, out, step, level_group, tiles.data, 2);
        w = {tiles.data, biased ? bias.data() : nullptr, in, out, step, level_group};
    }

    size_t at(int r, int c) const { return (static_cast<size_t>(r) * groups + c / group) * group / 4 + c % group / 4; }

    double value(int r, int c) const {
        const int code = weight[at(r, c)] >> (c % group % 4 * 2) & 3;
        const size_t g = static_cast<size_t>(r) * groups + c / group;
        return of_half(scale[g]) * levels[g * 4 + code];
    }

    void check_unpack() const {
        const int first = below(out), count = 1 + below(out - first);
        vector<uint8_t> weight_(static_cast<size_t>(count) * groups * group / 4);
        vector<int8_t> levels_(static_cast<size_t>(count) * groups * 4);
        vector<uint16_t> scale_(static_cast<size_t>(count) * groups);
        lbllm_unpack(&w, first, count, weight_.data(), levels_.data(), scale_.data());
        const bool same = std::equal(weight_.begin(), weight_.end(), weight.begin() + static_cast<long>(first * groups * group / 4)) &&
                          std::equal(levels_.begin(), levels_.end(), levels.begin() + static_cast<long>(first * groups * 4)) &&
                          std::equal(scale_.begin(), scale_.end(), scale.begin() + static_cast<long>(first * groups));
        expect(same, "unpack", "rows", first, count);
    }
};

// x as the quantizer gives it back, in double, by the library's own codes.
vector<double> values_of(const lbllm_quantizer& q, const void* x, int dtype, int rows, int width) {
    const int size = std::min(q.size, width), groups = (width + size - 1) / size;
    vector<uint8_t> places(static_cast<size_t>(rows) * width);
    vector<float> steps(static_cast<size_t>(rows) * groups);
    vector<int32_t> zeros(steps.size()), tables(steps.size());
    lbllm_quantize(&q, x, dtype, rows, width, places.data(), nullptr, steps.data(), zeros.data(), tables.data(), LBLLM_FLOAT32, 3);
    vector<double> values(static_cast<size_t>(rows) * width);
    for (int m = 0; m < rows; m++)
        for (int c = 0; c < width; c++) {
            const size_t g = static_cast<size_t>(m) * groups + c / size, i = static_cast<size_t>(m) * width + c;
            values[i] = static_cast<double>(steps[g]) * (places[i] - zeros[g]);
        }
    return values;
}

vector<double> values_of(const lbllm_quantizer& q, const vector<double>& x, int rows) {
    vector<float> narrow(x.begin(), x.end());
    return values_of(q, narrow.data(), LBLLM_FLOAT32, rows, static_cast<int>(x.size()) / rows);
}

// y and, for each of its values, the sum of the sizes of its terms.
void multiply(const Linear& linear, const vector<double>& x, int rows, vector<double>& y, vector<double>* sizes = nullptr) {
    y.assign(static_cast<size_t>(rows) * linear.out, 0.0);
    if (sizes) sizes->assign(y.size(), 0.0);
    for (int r = 0; r < linear.out; r++)
        for (int c = 0; c < linear.in; c++) {
            const double weight = linear.value(r, c);
            for (int m = 0; m < rows; m++) {
                const double term = weight * x[static_cast<size_t>(m) * linear.in + c];
                y[static_cast<size_t>(m) * linear.out + r] += term;
                if (sizes) (*sizes)[static_cast<size_t>(m) * linear.out + r] += fabs(term);
            }
        }
    for (int m = 0; m < rows && !linear.bias.empty(); m++)
        for (int r = 0; r < linear.out; r++) y[static_cast<size_t>(m) * linear.out + r] += linear.bias[static_cast<size_t>(r)];
}

vector<uint16_t> narrowed(const vector<float>& x) {
    vector<uint16_t> bits;
    for (const float value : x) bits.push_back(bfloat16(value));
    return bits;
}

void check_linear(int in, int out, int group, int kind, bool per_token, int rows, int dtype, int threads, int level_group = 0) {
    char about[128];
    snprintf(about, sizeof about, "%d x %d at %d, levels at %d, quantizer %d, per %s, %d rows, dtype %d", in, out, group, level_group,
             kind, per_token ? "token" : "group", rows, dtype);
    const Linear linear(in, out, group, below(2) == 1, 1.0, level_group);
    linear.check_unpack();
    const lbllm_quantizer q = any_quantizer(kind % kFull, per_token ? in : group);
    const vector<float> x = normals(static_cast<size_t>(rows) * in, static_cast<float>(pow(10, below(7) - 3)));
    const vector<uint16_t> bits = narrowed(x);
    const void* input = dtype == LBLLM_FLOAT32 ? static_cast<const void*>(x.data()) : bits.data();
    vector<float> y(static_cast<size_t>(rows) * out);
    vector<uint16_t> y_bits(y.size());
    void* output = dtype == LBLLM_FLOAT32 ? static_cast<void*>(y.data()) : y_bits.data();
    lbllm_linear(&linear.w, kind == kFull ? nullptr : &q, input, output, dtype, rows, threads);
    vector<double> wanted, sizes, values(x.begin(), x.end());
    for (size_t i = 0; i < values.size() && dtype != LBLLM_FLOAT32; i++) values[i] = of_bfloat16(bits[i]);
    multiply(linear, kind == kFull ? values : values_of(q, input, dtype, rows, in), rows, wanted, &sizes);
    double worst = 0;
    for (size_t i = 0; i < y.size(); i++) {
        const double found = dtype == LBLLM_FLOAT32 ? y[i] : of_bfloat16(y_bits[i]);
        const double rounding = dtype == LBLLM_FLOAT32 ? 6e-8 * fabs(wanted[i]) : fabs(wanted[i]) / 256;
        worst = std::max(worst, (fabs(found - wanted[i]) - rounding) / (sizes[i] + 1e-30));
    }
    expect(worst < 5e-7, "linear", about, worst, 5e-7);
}

// The quantizer's own error is at most that of the best candidate worked out in double, and its step is the refit of its codes.
void check_quantizer(int kind, int size, int width) {
    char about[64];
    snprintf(about, sizeof about, "quantizer %d, %d of %d", kind, size, width);
    const lbllm_quantizer q = any_quantizer(kind, size);
    const int rows = 5, groups = (width + size - 1) / size;
    const vector<float> x = normals(static_cast<size_t>(rows) * width, 3);
    vector<uint8_t> places(x.size());
    vector<float> steps(static_cast<size_t>(rows) * groups);
    vector<int32_t> zeros(steps.size()), tables(steps.size());
    lbllm_quantize(&q, x.data(), LBLLM_FLOAT32, rows, width, places.data(), nullptr, steps.data(), zeros.data(), tables.data(),
                   LBLLM_FLOAT32, 1);
    for (int at = 0; at < rows * groups; at++) {
        const size_t start = static_cast<size_t>(at / groups) * width + static_cast<size_t>(at % groups) * size;
        const int n = std::min(size, width - at % groups * size);
        double high = 0, low = 0, least = INFINITY;
        for (int i = 0; i < n; i++) high = std::max<double>(high, x[start + i]), low = std::max<double>(low, -x[start + i]);
        for (int t = 0; t < std::max(1, q.tables); t++)
            for (const double share : {1.0, 0.88}) {
                double zero = q.zero[t], step = std::max(high / (q.top[t] - zero), low / (zero > 0 ? zero : 1e-30)) * share;
                if (q.tables == 0) {
                    step = (high + low) / q.top[0];
                    zero = rint(low / step);
                }
                double product = 0, square = 0, error = 0;
                vector<double> lattice;
                for (int i = 0; i < n; i++) {
                    const double place = std::min<double>(std::max(rint(x[start + i] / step) + zero, 0.0), q.top[t]);
                    lattice.push_back(q.lattice[t][static_cast<int>(place)] - (q.tables == 0 ? zero : 0));
                    product += lattice.back() * x[start + i];
                    square += lattice.back() * lattice.back();
                }
                for (int i = 0; i < n; i++) error += pow(lattice[static_cast<size_t>(i)] * product / std::max(1.0, square) - x[start + i], 2);
                least = std::min(least, error);
            }
        double product = 0, square = 0, error = 0;
        for (int i = 0; i < n; i++) {
            const double lattice = places[start + i] - zeros[static_cast<size_t>(at)];
            product += lattice * x[start + i];
            square += lattice * lattice;
            error += pow(lattice * steps[static_cast<size_t>(at)] - x[start + i], 2);
        }
        const double refit = product / std::max(1.0, square);
        const double off = fabs(steps[static_cast<size_t>(at)] - refit) / (fabs(refit) + 1e-30);
        expect(off < 1e-6, "step", about, off, 1e-6);
        expect(error <= least * (1 + 1e-4) + 1e-9, "error of codes", about, error, least);
    }
}

// Values are their codes' with the stored step; gradients and their sums as plain loops have them, clipped values among them.
void check_training(int kind, int size, int groups, int step_dtype) {
    char about[64];
    snprintf(about, sizeof about, "training %d, %d groups of %d, steps of dtype %d", kind, groups, size, step_dtype);
    lbllm_quantizer q = any_quantizer(kind, size);
    for (auto& clip : q.clip) clip[0] = 0.7f, clip[1] = 0.6f;
    const vector<float> x = normals(static_cast<size_t>(groups) * size, 3), gradient = normals(x.size());
    vector<uint8_t> places(x.size());
    vector<float> values(x.size()), inputs(x.size()), steps(static_cast<size_t>(groups)), sums(3 * steps.size());
    vector<int32_t> zeros(steps.size()), tables(steps.size());
    lbllm_quantize(&q, x.data(), LBLLM_FLOAT32, groups, size, places.data(), values.data(), steps.data(), zeros.data(),
                   tables.data(), step_dtype, 2);
    lbllm_quantize_backward(&q, x.data(), LBLLM_FLOAT32, groups, values.data(), steps.data(), zeros.data(), tables.data(),
                            gradient.data(), inputs.data(), sums.data(), 2);
    int clipped = 0;
    for (size_t at = 0; at < steps.size(); at++) {
        const int top = q.top[tables[at]];
        if (step_dtype == LBLLM_BFLOAT16) expect(of_bfloat16(narrowed({steps[at]})[0]) == steps[at], "step", about, steps[at], 0);
        if (q.tables) expect(zeros[at] == q.zero[tables[at]], "zero", about, zeros[at], tables[at]);
        double wanted[3] = {}, terms[3] = {};
        for (int k = 0; k < size; k++) {
            const size_t i = at * static_cast<size_t>(size) + static_cast<size_t>(k);
            const float value = steps[at] * static_cast<float>(places[i] - zeros[at]);
            expect(values[i] == value, "value", about, values[i], value);
            const double place = x[i] * (1.0f / steps[at]) + static_cast<float>(zeros[at]);
            const int part = place > top + 0.5 ? 1 : place < -0.5 ? 2 : 0;
            const double term = gradient[i] * (part ? value : static_cast<double>(value) - x[i]);
            wanted[part] += term;
            terms[part] += fabs(term);
            clipped += part > 0;
            expect(inputs[i] == (part ? 0.0f : gradient[i]), "gradient", about, inputs[i], gradient[i]);
        }
        for (size_t part = 0; part < 3; part++) {
            const double off = fabs(sums[3 * at + part] - wanted[part]) / (terms[part] + 1e-30);
            expect(off < 1e-6, "sum of gradients", about, off, 1e-6);
        }
    }
    expect(clipped > 0, "clipped values", about, clipped, 1);
}

// An embedding or a head of any type, and its values.
struct Table {
    vector<float> values;
    vector<uint16_t> bits, scale;
    vector<int8_t> integers;
    lbllm_rows rows;

    Table(int count, int width, int dtype) : values(normals(static_cast<size_t>(count) * width)), bits(narrowed(values)) {
        for (size_t i = 0; i < values.size(); i++) integers.push_back(static_cast<int8_t>(below(255) - 127));
        // 2^-7 times 1 .. 2, a subnormal among them.
        for (int r = 0; r < count; r++) scale.push_back(below(9) ? static_cast<uint16_t>(8 << 10 | below(1024)) : 3);
        for (size_t i = 0; i < values.size(); i++) {
            if (dtype == LBLLM_BFLOAT16) values[i] = static_cast<float>(of_bfloat16(bits[i]));
            if (dtype == LBLLM_INT8) values[i] = static_cast<float>(of_half(scale[i / static_cast<size_t>(width)]) * integers[i]);
        }
        const void* weight = values.data();
        if (dtype == LBLLM_BFLOAT16) weight = bits.data();
        if (dtype == LBLLM_INT8) weight = integers.data();
        rows = {weight, dtype == LBLLM_INT8 ? scale.data() : nullptr, dtype};
    }
    Table(const Table&) = delete;
};

void check_head(int in, int out, int rows, int dtype, int threads, int weight_dtype) {
    char about[96];
    snprintf(about, sizeof about, "%d x %d, %d rows, dtype %d, weights of %d", in, out, rows, dtype, weight_dtype);
    const Table weight(out, in, weight_dtype);
    const vector<float> x = normals(static_cast<size_t>(rows) * in);
    const vector<uint16_t> bits = narrowed(x);
    vector<float> y(static_cast<size_t>(rows) * out);
    vector<uint16_t> y_bits(y.size());
    const bool wide = dtype == LBLLM_FLOAT32;
    lbllm_head(&weight.rows, wide ? static_cast<const void*>(x.data()) : bits.data(), wide ? static_cast<void*>(y.data()) : y_bits.data(),
               in, out, dtype, rows, threads);
    double worst = 0;
    for (int m = 0; m < rows; m++)
        for (int r = 0; r < out; r++) {
            double wanted = 0, size = 0;
            for (int c = 0; c < in; c++) {
                const size_t i = static_cast<size_t>(m) * in + c;
                const double term = weight.values[static_cast<size_t>(r) * in + c] * (wide ? x[i] : of_bfloat16(bits[i]));
                wanted += term;
                size += fabs(term);
            }
            const size_t at = static_cast<size_t>(m) * out + r;
            const double rounding = wide ? 0 : fabs(wanted) / 256;
            worst = std::max(worst, (fabs((wide ? y[at] : of_bfloat16(y_bits[at])) - wanted) - rounding) / (size + 1e-30));
        }
    expect(worst < 5e-7, "head", about, worst, 5e-7);
}

int record_bytes(const lbllm_quantizer& q, int head_dim) { return (head_dim + q.size - 1) / q.size * ((q.size + 1) / 2 + 3); }

// Value i of a head.
double in_record(const lbllm_quantizer& q, const uint8_t* record, int i) {
    record += i / q.size * ((q.size + 1) / 2 + 3);
    const int in = i % q.size, code = record[in / 2] >> (in % 2 * 4) & 15, mark = record[(q.size + 1) / 2 + 2];
    uint16_t step;
    memcpy(&step, record + (q.size + 1) / 2, 2);
    return of_bfloat16(step) * (q.tables ? q.value[mark][code] : q.value[0][code] - mark);
}

vector<double> normed(const vector<double>& x, const vector<float>& weight, size_t from, size_t n) {
    double total = 0;
    for (size_t i = 0; i < n; i++) total += x[from + i] * x[from + i];
    vector<double> y(n);
    for (size_t i = 0; i < n; i++) y[i] = x[from + i] / sqrt(total / static_cast<double>(n) + 1e-6) * weight[i];
    return y;
}

vector<double> all_normed(const vector<double>& x, const vector<float>& weight) {
    vector<double> y;
    for (size_t from = 0; from < x.size(); from += weight.size()) {
        const vector<double> row = normed(x, weight, from, weight.size());
        y.insert(y.end(), row.begin(), row.end());
    }
    return y;
}

vector<float> norm_weights(int n) {
    vector<float> weight;
    for (int i = 0; i < n; i++) weight.push_back(static_cast<float>(0.5 + uniform()));
    return weight;
}

// A block's decode step. Returns the mean difference of its output, relative to what the block adds.
double step_difference(int hidden, int heads, int kv_heads, int d, int inner, int group, int kind, int size, int rows, int tokens,
                       bool masked, bool with_norms, int threads) {
    const Linear qkv(hidden, (heads + 2 * kv_heads) * d, group, with_norms, 0.125), o(heads * d, hidden, group, false, 0.125);
    const Linear gate_up(hidden, 2 * inner, group, false, 0.125), down(inner, hidden, group, false, 0.125);
    const lbllm_quantizer q = any_quantizer(kind, group), by = any_quantizer(kind, size);
    const lbllm_quantizer by_values = any_quantizer(4, size);
    const vector<float> before = norm_weights(hidden), after = norm_weights(hidden), query_norm = norm_weights(d), key_norm = norm_weights(d);
    const vector<float> centre = normals(static_cast<size_t>(kv_heads) * d);
    const lbllm_block block{qkv.w, o.w, gate_up.w, down.w, &q, &q, &q, &q, &by, &by_values, before.data(), after.data(),
                            with_norms ? query_norm.data() : nullptr, with_norms ? key_norm.data() : nullptr,
                            with_norms ? centre.data() : nullptr,
                            1e-6f, static_cast<float>(1 / sqrt(d)), hidden, heads, kv_heads, d, inner, LBLLM_FLOAT32};
    // Room for exactly the new token; records of the old ones are what the quantizer may write.
    const int bytes = record_bytes(by, d), value_bytes = record_bytes(by_values, d), kept = tokens + 1;
    vector<uint8_t> keys(static_cast<size_t>(rows) * kv_heads * kept * bytes, 0xee);
    vector<uint8_t> values(static_cast<size_t>(rows) * kv_heads * kept * value_bytes, 0xee);
    auto fill_records = [&](vector<uint8_t>& records, const lbllm_quantizer& by_, int size_of) {
        for (int h = 0; h < rows * kv_heads; h++)
            for (int t = 0; t < tokens; t++) {
                uint8_t* record = records.data() + (static_cast<size_t>(h) * kept + t) * size_of;
                for (int g = 0; g < (d + by_.size - 1) / by_.size; g++, record += (by_.size + 1) / 2 + 3) {
                    for (int i = 0; i < by_.size / 2; i++) record[i] = static_cast<uint8_t>(below(256));
                    const uint16_t step = bfloat16(static_cast<float>(0.05 + 0.05 * uniform()));
                    memcpy(record + by_.size / 2, &step, 2);
                    record[by_.size / 2 + 2] = static_cast<uint8_t>(by_.tables ? below(by_.tables) : below(16));
                }
            }
    };
    fill_records(keys, by, bytes);
    fill_records(values, by_values, value_bytes);
    vector<float> mask(static_cast<size_t>(rows) * kept);
    for (float& m : mask) m = below(3) ? 0.0f : -1e38f;
    for (int m = 0; m < rows; m++) mask[static_cast<size_t>(m) * kept + tokens] = 0;
    const lbllm_cache cache{keys.data(), values.data(), static_cast<int64_t>(kv_heads) * kept * bytes, static_cast<int64_t>(kept) * bytes,
                            static_cast<int64_t>(kv_heads) * kept * value_bytes, static_cast<int64_t>(kept) * value_bytes, tokens,
                            masked ? mask.data() : nullptr, rows, kv_heads, bytes, value_bytes};
    const vector<float> x = normals(static_cast<size_t>(rows) * hidden);
    vector<float> cosine, sine, y(x.size());
    for (int m = 0; m < rows; m++)
        for (int i = 0; i < d; i++) {
            const double angle = (tokens + m) * pow(100, -2.0 * (i % (d / 2)) / d);
            cosine.push_back(static_cast<float>(cos(angle)));
            sine.push_back(static_cast<float>(sin(angle)));
        }
    lbllm_block_step(&block, &cache, x.data(), y.data(), cosine.data(), sine.data(), LBLLM_FLOAT32, rows, threads);

    vector<double> stream(x.begin(), x.end()), projected, mixed(static_cast<size_t>(rows) * heads * d), out;
    multiply(qkv, values_of(q, all_normed(stream, before), rows), rows, projected);
    const int wide = (heads + 2 * kv_heads) * d, shared = heads / kv_heads;
    for (int m = 0; m < rows; m++) {
        for (int h = 0; h < heads + kv_heads; h++) {
            double* head = projected.data() + static_cast<size_t>(m) * wide + static_cast<size_t>(h) * d;
            vector<double> own(head, head + d);
            if (with_norms) own = normed(own, h < heads ? query_norm : key_norm, 0, own.size());
            for (int i = 0; i < d; i++) {
                const double other = i < d / 2 ? -own[static_cast<size_t>(i + d / 2)] : own[static_cast<size_t>(i - d / 2)];
                head[i] = own[static_cast<size_t>(i)] * cosine[static_cast<size_t>(m * d + i)] + other * sine[static_cast<size_t>(m * d + i)];
                if (with_norms && h >= heads) head[i] -= centre[static_cast<size_t>((h - heads) * d + i)];
            }
        }
        for (int h = 0; h < kv_heads; h++) {
            // What was written stands for the head's key and value: no further than codes of 16 levels leave it.
            double off = 0, norm = 0;
            const size_t place = (static_cast<size_t>(m) * kv_heads + h) * kept;
            for (int i = 0; i < d; i++) {
                const double* row = projected.data() + static_cast<size_t>(m) * wide;
                const double key = row[(heads + h) * d + i], value = row[(heads + kv_heads + h) * d + i];
                off += pow(in_record(by, keys.data() + (place + tokens) * bytes, i) - key, 2);
                off += pow(in_record(by_values, values.data() + (place + tokens) * value_bytes, i) - value, 2);
                norm += key * key + value * value;
            }
            expect(off < 0.06 * norm, "records", "squared error", off / norm, 0.06);
        }
        for (int h = 0; h < heads; h++) {
            const double* query = projected.data() + static_cast<size_t>(m) * wide + static_cast<size_t>(h) * d;
            const size_t place = (static_cast<size_t>(m) * kv_heads + h / shared) * kept;
            vector<double> scores(static_cast<size_t>(kept));
            double top = -INFINITY, total = 0;
            for (int t = 0; t < kept; t++) {
                double score = masked ? mask[static_cast<size_t>(m * kept + t)] : 0;
                for (int i = 0; i < d; i++) score += query[i] * in_record(by, keys.data() + (place + t) * bytes, i) / sqrt(d);
                scores[static_cast<size_t>(t)] = score;
                top = std::max(top, score);
            }
            for (double& score : scores) total += score = exp(score - top);
            for (int t = 0; t < kept; t++)
                for (int i = 0; i < d; i++)
                    mixed[static_cast<size_t>(m) * heads * d + static_cast<size_t>(h) * d + i] +=
                        scores[static_cast<size_t>(t)] / total * in_record(by_values, values.data() + (place + t) * value_bytes, i);
        }
    }
    auto add = [&](const vector<double>& more) {
        for (size_t i = 0; i < stream.size(); i++) stream[i] += more[i];
    };
    multiply(o, values_of(q, mixed, rows), rows, out);
    add(out);
    multiply(gate_up, values_of(q, all_normed(stream, after), rows), rows, projected);
    vector<double> activated;
    for (int m = 0; m < rows; m++)
        for (int i = 0; i < inner; i++) {
            const double gate = projected[static_cast<size_t>(m) * 2 * inner + i], up = projected[static_cast<size_t>(m) * 2 * inner + inner + i];
            activated.push_back(gate / (1 + exp(-gate)) * up);
        }
    multiply(down, values_of(q, activated, rows), rows, out);
    add(out);
    double off = 0, size_of_added = 0;
    for (size_t i = 0; i < stream.size(); i++) {
        off += fabs(y[i] - stream[i]);
        size_of_added += fabs(stream[i] - x[i]);
    }
    return off / size_of_added;
}

void check_steps() {
    vector<double> differences;
    const int shapes[][6] = {  // hidden, heads, kv_heads, head_dim, inner, group
        {80, 4, 2, 20, 112, 32}, {64, 4, 4, 16, 100, 64}, {100, 6, 2, 24, 90, 16}, {128, 3, 1, 64, 192, 96}, {72, 2, 1, 36, 130, 128}};
    for (const auto& s : shapes)
        for (int turn = 0; turn < 4; turn++) {
            const int size = std::min(s[3], turn % 2 ? 16 : 64), tokens = turn == 0 ? 1 : 3 + below(150);
            const int kind = turn == 3 ? 4 : below(4);
            differences.push_back(step_difference(s[0], s[1], s[2], s[3], s[4], s[5], kind, size, 1 + turn % 3, tokens, turn % 2 == 1,
                                                  turn >= 2, 1 + turn % 3));
        }
    std::sort(differences.begin(), differences.end());
    // An input at the edge between two codes may go over in the one and not in the other; then a code's width shows.
    const double most = differences[differences.size() * 3 / 4], worst = differences.back();
    printf("%s: block steps differ by %.2g in three of four cases, %.2g at most\n", lbllm_tier(), most, worst);
    expect(most < 1e-5, "block step", "three quarters", most, 1e-5);
    expect(worst < 0.03, "block step", "worst", worst, 0.03);
}

// Tokens of one text through a model at once: logits and records as token by token through its blocks, each of them checked above.
double run_difference(int kind, int before, int count, int threads) {
    const int hidden = 72, heads = 6, kv_heads = 2, d = 20, inner = 100, group = 32, vocab = 50, wide = (heads + 2 * kv_heads) * d;
    const lbllm_quantizer q = any_quantizer(kind, group), by = any_quantizer(kind, 16), by_values = any_quantizer(4, 16);
    const vector<float> before_norm = norm_weights(hidden), after_norm = norm_weights(hidden), last_norm = norm_weights(hidden);
    const vector<float> centre = normals(kv_heads * d);
    const Table embedding(vocab, hidden, kind % 3), head(vocab, hidden, (kind + 1) % 3);
    const Linear qkv(hidden, wide, group, false, 0.125), o(heads * d, hidden, group, true, 0.125);
    const Linear gate_up(hidden, 2 * inner, group, false, 0.125), down(inner, hidden, group, false, 0.125);
    const lbllm_block block{qkv.w, o.w, gate_up.w, down.w, &q, &q, &q, &q, &by, &by_values, before_norm.data(), after_norm.data(),
                            nullptr, nullptr, centre.data(), 1e-6f, static_cast<float>(1 / sqrt(d)), hidden, heads, kv_heads, d, inner,
                            LBLLM_FLOAT32};
    const lbllm_block blocks[2] = {block, block};
    vector<float> frequencies;
    for (int i = 0; i < d / 2; i++) frequencies.push_back(static_cast<float>(pow(100, -2.0 * i / d)));
    const lbllm_model model{blocks, embedding.rows, head.rows, last_norm.data(), frequencies.data(), 0.9f, 1e-6f,
                            2, vocab, hidden, d, LBLLM_FLOAT32};
    const int bytes = record_bytes(by, d), value_bytes = record_bytes(by_values, d), kept = before + count;
    vector<uint8_t> records[2][4];
    auto caches = [&](int which, int tokens, lbllm_cache found[2]) {
        for (int b = 0; b < 2; b++) {
            vector<uint8_t>&keys = records[which][2 * b], &values = records[which][2 * b + 1];
            keys.resize(static_cast<size_t>(kv_heads) * kept * bytes, 0);
            values.resize(static_cast<size_t>(kv_heads) * kept * value_bytes, 0);
            found[b] = {keys.data(), values.data(), 0, static_cast<int64_t>(kept) * bytes, 0, static_cast<int64_t>(kept) * value_bytes,
                        tokens, nullptr, 1, kv_heads, bytes, value_bytes};
        }
    };
    vector<int32_t> tokens;
    for (int t = 0; t < kept; t++) tokens.push_back(below(vocab));
    vector<float> found(vocab), stream(hidden);
    lbllm_cache all[2], own[2];
    caches(0, 0, all);
    if (before) lbllm_run(&model, all, tokens.data(), before, nullptr, threads);
    caches(0, before, all);
    lbllm_run(&model, all, tokens.data() + before, count, found.data(), threads);
    for (int t = 0; t < kept; t++) {
        caches(1, t, own);
        const long row = tokens[static_cast<size_t>(t)] * hidden;
        stream.assign(embedding.values.begin() + row, embedding.values.begin() + row + hidden);
        vector<float> cosine, sine;
        for (int i = 0; i < d; i++) {
            const double angle = static_cast<float>(t) * frequencies[static_cast<size_t>(i % (d / 2))];
            cosine.push_back(static_cast<float>(0.9 * cos(angle)));
            sine.push_back(static_cast<float>(0.9 * sin(angle)));
        }
        for (int b = 0; b < 2; b++) {
            vector<float> next(hidden);
            lbllm_block_step(&block, own + b, stream.data(), next.data(), cosine.data(), sine.data(), LBLLM_FLOAT32, 1, 1);
            stream = next;
        }
    }
    const vector<double> normed_ = normed(vector<double>(stream.begin(), stream.end()), last_norm, 0, hidden);
    double off = 0, size = 0;
    for (int r = 0; r < vocab; r++) {
        double wanted = 0;
        for (int c = 0; c < hidden; c++)
            wanted += head.values[static_cast<size_t>(r) * hidden + c] * normed_[static_cast<size_t>(c)];
        off += fabs(found[static_cast<size_t>(r)] - wanted);
        size += fabs(wanted);
    }
    return off / size;
}

void check_runs() {
    vector<double> differences;
    const int lengths[][2] = {{0, 1}, {0, 2}, {0, 33}, {5, 31}, {130, 3}, {0, 300}, {250, 70}, {7, 1}};
    // Long texts, which are nearly all of the time under sanitizers, with two of the five kinds of records.
    for (int kind = 0; kind < 5; kind++)
        for (const auto& l : lengths)
            if (l[0] + l[1] < 100 || kind % 2) differences.push_back(run_difference(kind, l[0], l[1], 1 + kind % 3));
    std::sort(differences.begin(), differences.end());
    const double most = differences[differences.size() / 2], worst = differences.back();
    printf("%s: runs differ by %.2g in half of the cases, %.2g at most\n", lbllm_tier(), most, worst);
    expect(most < 1e-5, "run", "half", most, 1e-5);
    // A code that goes over its edge changes all that comes behind it, here in a model without any sense.
    expect(worst < 0.3, "run", "worst", worst, 0.3);
}

// A drawn token is one that the settings leave, by a slow sort; of what is not finite none is drawn.
void check_sample() {
    uint64_t numbers = 3;
    for (int turn = 0; turn < 300; turn++) {
        const int vocab = 1 + below(turn % 3 ? 40 : 700);
        vector<float> logits = normals(static_cast<size_t>(vocab), 3);
        const lbllm_sampling s{below(4) ? 0.7f : 0.0f, below(2) ? 0.8f : 1.0f, below(2) ? 0.1f : 0.0f, below(2) ? 1.5f : 1.0f,
                               below(2) ? 1 + below(9) : 0};
        vector<int32_t> before;
        for (int i = below(5); i > 0; i--) before.push_back(below(vocab));
        vector<double> scores(logits.begin(), logits.end());
        vector<bool> seen(scores.size());
        for (const int32_t token : before) seen[static_cast<size_t>(token)] = true;
        for (size_t i = 0; i < scores.size(); i++)
            if (seen[i]) scores[i] = scores[i] > 0 ? scores[i] / s.penalty : scores[i] * s.penalty;
        vector<double> sorted = scores;
        std::sort(sorted.rbegin(), sorted.rend());
        if (s.top_k && static_cast<size_t>(s.top_k) < sorted.size()) sorted.resize(static_cast<size_t>(s.top_k));
        double total = 0, reached = 0, least = sorted[0];
        for (const double score : sorted) total += exp((score - sorted[0]) / s.temperature);
        for (size_t i = 0; s.temperature > 0 && i < sorted.size() && (i == 0 || reached < s.top_p * total); i++) {
            const double chance = exp((sorted[i] - sorted[0]) / s.temperature);
            reached += chance;
            if (chance >= s.min_p) least = sorted[i];
        }
        int32_t token = -1;
        const int32_t code = lbllm_sample(&s, logits.data(), vocab, before.data(), static_cast<int64_t>(before.size()), &numbers, &token);
        const bool drawn = code == LBLLM_OK && token >= 0 && token < vocab;
        expect(drawn && scores[static_cast<size_t>(token)] >= least - 1e-5, "sample", "a token that is left", token, vocab);
        logits[static_cast<size_t>(below(vocab))] = NAN;
        expect(lbllm_sample(&s, logits.data(), vocab, nullptr, 0, &numbers, &token) == LBLLM_NOT_FINITE, "sample", "not a number", turn, 0);
    }
}

void check_read() {
    Aligned<uint32_t> words(3 * 1024);
    uint64_t total = 0;
    for (int i = 0; i < 3 * 1024; i++) total += words.data[i] = next() & 0xfffff;
    expect(lbllm_read(reinterpret_cast<const uint8_t*>(words.data), 3 * 4096, 2) == total, "read", "sum of words", 0, 0);
}

void check_tier() {
    state = 7;
    const int shapes[][3] = {{100, 7, 48}, {576, 9, 128}, {200, 33, 64}, {16, 1, 16}, {300, 17, 256}, {192, 8, 96}, {1, 3, 32}, {400, 5, 192}};
    for (const auto& s : shapes)
        for (int kind = 0; kind <= kFull; kind++)
            for (const int rows : {1 + below(3), 4 + below(6)}) check_linear(s[0], s[1], s[2], kind, below(2), rows, below(2), 1);
    // The last: inputs that share levels, where a row has one scale.
    const int placed[][4] = {{100, 7, 48, 16}, {576, 9, 128, 32}, {200, 33, 64, 16}, {300, 17, 256, 64}, {16, 1, 16, 48}};
    for (const auto& s : placed)
        for (int kind = 0; kind <= kFull; kind++)
            for (const int rows : {1 + below(3), 4 + below(6)})
                check_linear(s[0], s[1], s[2], kind, below(2), rows, below(2), 1, s[3]);
    check_linear(260, 130, 64, 1, false, 130, LBLLM_FLOAT32, 3, 16);
    check_linear(260, 130, 64, 1, false, 130, LBLLM_FLOAT32, 3);
    check_linear(260, 130, 64, 2, true, 37, LBLLM_BFLOAT16, 2);
    for (int kind = 0; kind < 6; kind++)
        for (const int size : {16, 48, 100, 256})
            for (const int width : {7, 100, 256}) check_quantizer(kind, size, width);
    for (int kind = 0; kind < 6; kind++)
        for (const int size : {16, 24, 100, 256})
            for (const int step_dtype : {LBLLM_FLOAT32, LBLLM_BFLOAT16}) check_training(kind, size, 9 + 300 * (kind == 1), step_dtype);
    for (const int in : {1, 15, 16, 40, 100, 577})
        for (int rows = 1; rows <= 4; rows++) check_head(in, 1 + below(40), rows, below(2), 1, rows % 3);
    check_head(600, 700, 2, LBLLM_BFLOAT16, 3, LBLLM_BFLOAT16);
    check_steps();
    check_runs();
    check_sample();
    check_read();
    // Steps of less than a chunk: parts of a group. Behind the others, whose random numbers stay what their limits were set for.
    const int parts[][4] = {{200, 33, 32, 16}, {300, 17, 16, 16}, {130, 9, 32, 64}, {40, 5, 16, 32}, {576, 8, 32, 16}};
    for (const auto& s : parts)
        for (int kind = 0; kind <= kFull; kind++)
            for (const int rows : {1 + below(3), 4 + below(6)})
                check_linear(s[0], s[1], s[2], kind, below(2), rows, below(2), 1, s[3]);
}

}  // namespace

int main() {
    int ran = 0;
    for (const char* name : {"portable", "avx2", "avxvnni", "avx512"})
        if (lbllm_choose_tier(name) == 0) {
            const int before = failures;
            check_tier();
            ran++;
            printf("%s: %s\n", name, failures == before ? "good" : "bad");
        }
    return failures ? 1 : ran ? 0 : 77;
}
