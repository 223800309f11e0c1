// Eight floats at a time in compiler vectors; the few operations that need an instruction of their own are chosen here.
// Everything is in an unnamed namespace, and nothing of the C++ library is used: of a template that several tiers instantiate the
// linker keeps one copy, and it may be the one for AVX-512.
#include <stdlib.h>
#include <string.h>

#if defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#endif

#include "layout.h"
#include "tier.h"

namespace {

template <typename T>
inline T larger(T a, T b) {
    return a > b ? a : b;
}

template <typename T>
inline T smaller(T a, T b) {
    return a < b ? a : b;
}

inline void fill(float* from, float* to, float value) {
    for (; from < to; from++) *from = value;
}

typedef float v8f __attribute__((vector_size(32)));
typedef int32_t v8i __attribute__((vector_size(32)));
typedef uint32_t v8u __attribute__((vector_size(32)));

template <typename V>
inline V load(const void* from) {
    V v;
    memcpy(&v, from, sizeof v);
    return v;
}

template <typename V>
inline void store(void* to, V v) {
    memcpy(to, &v, sizeof v);
}

inline v8f all(float x) { return v8f{x, x, x, x, x, x, x, x}; }

// b where either is not a number: what the instruction does.
inline v8f maximum(v8f a, v8f b) {
#if defined(__AVX2__)
    return (v8f)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

inline v8f minimum(v8f a, v8f b) {
#if defined(__AVX2__)
    return (v8f)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return a < b ? a : b;
#endif
}

// a * b + c, rounded once where the tier can.
inline v8f fused(v8f a, v8f b, v8f c) {
#if defined(__FMA__)
    return (v8f)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// To the nearest integer, ties to even. |x| < 2^22.
inline v8f rounded(v8f x) {
    const v8f magic = all(12582912.0f);
    return (x + magic) - magic;
}

inline v8f to_float(v8i x) { return __builtin_convertvector(x, v8f); }
inline v8i to_int(v8f x) { return __builtin_convertvector(x, v8i); }

inline float sum(v8f x) {
#if defined(__AVX2__)
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
#endif
    const float a = (x[0] + x[4]) + (x[2] + x[6]), b = (x[1] + x[5]) + (x[3] + x[7]);
    return a + b;
}

inline float largest(v8f x) {
    float m = x[0];
    for (int i = 1; i < 8; i++) m = x[i] > m ? x[i] : m;
    return m;
}

#if defined(__AVX2__)
// Sums within halves of four vectors, two rows each: of rows 0 2 4 6 1 3 5 7.
inline v8i row_sums(__m256i a, __m256i b, __m256i c, __m256i d) {
    const __m256i ab = _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    const __m256i cd = _mm256_add_epi32(_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
    return (v8i)_mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
}
#endif

// Eight int8.
inline v8f bytes(const int8_t* from) {
#if defined(__AVX2__)
    return (v8f)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
    v8i v;
    for (int i = 0; i < 8; i++) v[i] = from[i];
    return to_float(v);
#endif
}

// table[index] of 32 indices in 0..top, top <= 127, to int8 [32].
inline void look_up(const int8_t* table, int top, const v8i index[4], int8_t* out) {
#if defined(__AVX2__)
    const __m256i low = _mm256_packs_epi32((__m256i)index[0], (__m256i)index[1]);
    const __m256i high = _mm256_packs_epi32((__m256i)index[2], (__m256i)index[3]);
    const __m256i order = _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0);
    const __m256i at = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
    __m256i found = _mm256_setzero_si256();
    for (int part = 0; part <= top; part += 16) {
        // An index of this part keeps bit 7 clear; of any other a shuffle makes zero. Four shuffles replace 32 loads of a gather.
        const __m256i place = _mm256_xor_si256(at, _mm256_set1_epi8(static_cast<char>(part)));
        const __m256i inside = _mm256_adds_epu8(place, _mm256_set1_epi8(0x70));
        const __m256i entries = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table + part)));
        found = _mm256_or_si256(found, _mm256_shuffle_epi8(entries, inside));
    }
    store(out, found);
#else
    (void)top;
    for (int i = 0; i < 32; i++) out[i] = table[index[i / 8][i % 8]];
#endif
}

// Eight float16.
inline v8f halves(const uint8_t* from) {
#if defined(__F16C__)
    return (v8f)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
    // Exponent and fraction moved into a float32's place, times 2^112: right for subnormals too. Scales are finite, not negative.
    uint16_t bits[8];
    memcpy(bits, from, sizeof bits);
    v8u wide;
    for (int i = 0; i < 8; i++) wide[i] = static_cast<uint32_t>(bits[i]) << 13;
    v8f v;
    memcpy(&v, &wide, sizeof v);
    return v * all(5.192296858534828e33f);
#endif
}

// Eight int16.
inline v8f shorts(const uint8_t* from) {
#if defined(__AVX2__)
    return (v8f)_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
    int16_t values[8];
    memcpy(values, from, sizeof values);
    v8i v;
    for (int i = 0; i < 8; i++) v[i] = values[i];
    return to_float(v);
#endif
}

inline float from_bfloat16(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    memcpy(&x, &wide, 4);
    return x;
}

// Nearest, ties to even, as torch rounds.
inline uint16_t to_bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// e^x to 2e-7 of its value for x in -87..88, 0 below.
inline v8f exponential(v8f x) {
    const v8f inside = minimum(maximum(x, all(-87.0f)), all(88.0f));
    const v8f n = rounded(inside * all(1.44269504f));
    const v8f r = fused(n, all(2.12194440e-4f), fused(n, all(-0.693359375f), inside));
    v8f p = all(1.9875691500e-4f);
    const float terms[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    for (const float term : terms) p = fused(p, r, all(term));
    p = fused(p, r * r, r) + all(1.0f);
    const v8i power = (to_int(n) + 127) << 23;
    v8f scale;
    memcpy(&scale, &power, sizeof scale);
    return x < all(-87.0f) ? all(0.0f) : p * scale;
}

inline void read_floats(const void* from, int dtype, int64_t at, int n, float* to) {
    if (dtype == LBLLM_FLOAT32) {
        memcpy(to, static_cast<const float*>(from) + at, static_cast<size_t>(n) * 4);
        return;
    }
    const uint16_t* bits = static_cast<const uint16_t*>(from) + at;
    for (int i = 0; i < n; i++) to[i] = from_bfloat16(bits[i]);
}

inline void write_floats(const float* from, int n, void* to, int dtype, int64_t at) {
    if (dtype == LBLLM_FLOAT32) {
        memcpy(static_cast<float*>(to) + at, from, static_cast<size_t>(n) * 4);
        return;
    }
    uint16_t* bits = static_cast<uint16_t*>(to) + at;
    for (int i = 0; i < n; i++) bits[i] = to_bfloat16(from[i]);
}

// Memory that a thread keeps between calls, aligned for the widest vectors.
template <typename T>
class Scratch {
  public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { free(held_); }

    T* of(int64_t count) {
        const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64;
        if (bytes > size_) {
            free(held_);
            held_ = aligned_alloc(64, bytes);
            if (!held_) abort();
            size_ = bytes;
        }
        return static_cast<T*>(held_);
    }

  private:
    void* held_ = nullptr;
    size_t size_ = 0;
};

// Threads for `work` operations: below `least` of them each, waking a thread costs more than it saves.
inline int useful_threads(int threads, int64_t work, int64_t least) {
    return static_cast<int>(larger<int64_t>(1, smaller<int64_t>(threads, work / least)));
}

}  // namespace
