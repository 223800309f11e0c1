// Dot products on 512-bit vectors with VNNI: four rows by 16 columns, products added in int32 by one instruction.

namespace {

constexpr int kTokens = 8;  // whose dot products are taken together

inline __m512i four_lanes(const uint8_t* x) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}

inline __m512i table_lanes(const int8_t* x) { return four_lanes(reinterpret_cast<const uint8_t*>(x)); }

// Places of two units of 16 columns to levels: [2][8] -> int8 [2][8][4]. A byte is spread over four; by its halves means and
// half-widths of the inner pair are looked up for two of them, of the outer pair for the others.
inline __m512i spread(const uint8_t* places) {
    const __m512i each = _mm512_set_epi32(0x0f0f0f0f, 0x0e0e0e0e, 0x0d0d0d0d, 0x0c0c0c0c, 0x0b0b0b0b, 0x0a0a0a0a, 0x09090909, 0x08080808,
                                          0x07070707, 0x06060606, 0x05050505, 0x04040404, 0x03030303, 0x02020202, 0x01010101, 0);
    constexpr __mmask64 kOuter = 0xCCCCCCCCCCCCCCCC, kLower = 0x5555555555555555;
    const __m512i byte = _mm512_shuffle_epi8(four_lanes(places), each), low = _mm512_set1_epi8(15);
    const __m512i of_mean = _mm512_and_si512(byte, low), of_half = _mm512_and_si512(_mm512_srli_epi16(byte, 4), low);
    const __m512i inner = _mm512_shuffle_epi8(table_lanes(lbllm::kMeans[0]), of_mean);
    const __m512i near = _mm512_shuffle_epi8(table_lanes(lbllm::kHalfWidths[0]), of_half);
    const __m512i mean = _mm512_mask_shuffle_epi8(inner, kOuter, table_lanes(lbllm::kMeans[1]), of_mean);
    const __m512i half = _mm512_mask_shuffle_epi8(near, kOuter, table_lanes(lbllm::kHalfWidths[1]), of_half);
    return _mm512_mask_sub_epi8(_mm512_add_epi8(mean, half), kLower, mean, half);
}

// Level tables of four rows: by the lower code of a nibble, and by the upper one (dots_avx2.inl).
struct Tables {
    __m512i lower, upper;
};

inline void tables_of(const uint8_t* levels, Tables table[2]) {
    const __m512i rows = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(levels)));
    const __m512i upper = _mm512_broadcast_i32x4(_mm_set_epi32(0x03030303, 0x02020202, 0x01010101, 0));
    table[0].lower = _mm512_permutexvar_epi32(_mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0), rows);
    table[1].lower = _mm512_permutexvar_epi32(_mm512_set_epi32(7, 7, 7, 7, 6, 6, 6, 6, 5, 5, 5, 5, 4, 4, 4, 4), rows);
    for (int half = 0; half < 2; half++) table[half].upper = _mm512_shuffle_epi8(table[half].lower, upper);
}

// Levels of four vectors of columns.
inline void levels_of(const Tables& table, const uint8_t* codes, __m512i w[4]) {
    const __m512i v = _mm512_loadu_si512(codes), nibble = _mm512_set1_epi8(15);
    const __m512i low = _mm512_and_si512(v, nibble), high = _mm512_and_si512(_mm512_srli_epi16(v, 4), nibble);
    w[0] = _mm512_shuffle_epi8(table.lower, low);
    w[1] = _mm512_shuffle_epi8(table.upper, low);
    w[2] = _mm512_shuffle_epi8(table.lower, high);
    w[3] = _mm512_shuffle_epi8(table.upper, high);
}

// The same where each vector has levels of its own. placed: of units 0 and 1, and of 2 and 3; half: which four rows.
inline void placed_levels_of(const __m512i placed[2], int half, const uint8_t* codes, __m512i w[4]) {
    const __m512i v = _mm512_loadu_si512(codes), nibble = _mm512_set1_epi8(15);
    const __m512i index[2] = {_mm512_and_si512(v, nibble), _mm512_and_si512(_mm512_srli_epi16(v, 4), nibble)};
    const __m512i lanes = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    const __m512i upper = _mm512_broadcast_i32x4(_mm_set_epi32(0x03030303, 0x02020202, 0x01010101, 0));
    for (int k = 0; k < 4; k++) {
        const __m512i first = _mm512_add_epi32(lanes, _mm512_set1_epi32(k % 2 * 8 + half * 4));
        const __m512i table = _mm512_permutexvar_epi32(first, placed[k / 2]);
        w[k] = _mm512_shuffle_epi8(k % 2 ? _mm512_shuffle_epi8(table, upper) : table, index[k / 2]);
    }
}

inline v8i row_sums(__m512i low, __m512i high) {
    return row_sums(_mm512_castsi512_si256(low), _mm512_extracti64x4_epi64(low, 1), _mm512_castsi512_si256(high),
                    _mm512_extracti64x4_epi64(high, 1));
}

template <int kSafe, int kChunks, bool kPlaced>
inline v8i dots(const uint8_t* codes, const uint8_t* levels, const uint8_t* x, int chunks) {
    Tables table[2];
    if (!kPlaced) tables_of(levels, table);
    __m512i low = _mm512_setzero_si512(), high = low, a[4], b[4];
    for (int c = 0; c < (kChunks ? kChunks : chunks); c++, codes += lbllm::kChunkBytes, x += lbllm::kChunk) {
        if (kPlaced) {
            const uint8_t* places = levels + c * lbllm::kChunkPlaces;
            const __m512i placed[2] = {spread(places), spread(places + 16)};
            placed_levels_of(placed, 0, codes, a);
            placed_levels_of(placed, 1, codes + 64, b);
        } else {
            levels_of(table[0], codes, a);
            levels_of(table[1], codes + 64, b);
        }
        for (int k = 0; k < 4; k++) {
            low = _mm512_dpbusd_epi32(low, four_lanes(x + k * 16), a[k]);
            high = _mm512_dpbusd_epi32(high, four_lanes(x + k * 16), b[k]);
        }
    }
    return row_sums(low, high);
}

// The same of a chunk whose levels are places, for each of its parts.
template <int kSafe, int kParts>
inline void dots_of_parts(const uint8_t* codes, const uint8_t* places, const uint8_t* x, v8i* out) {
    const __m512i placed[2] = {spread(places), spread(places + 16)};
    __m512i a[4], b[4];
    placed_levels_of(placed, 0, codes, a);
    placed_levels_of(placed, 1, codes + 64, b);
    for (int part = 0; part < kParts; part++) {
        __m512i low = _mm512_setzero_si512(), high = low;
        for (int k = part * 4 / kParts; k < (part + 1) * 4 / kParts; k++) {
            low = _mm512_dpbusd_epi32(low, four_lanes(x + k * 16), a[k]);
            high = _mm512_dpbusd_epi32(high, four_lanes(x + k * 16), b[k]);
        }
        out[part] = row_sums(low, high);
    }
}

// Codes of `chunks` chunks of 8 rows to their levels: int8 [chunks][4][8][16]. levels: as a record has them, kPlaced: places.
template <bool kPlaced>
inline void decode(const uint8_t* codes, const uint8_t* levels, int chunks, int8_t* out) {
    Tables table[2];
    if (!kPlaced) tables_of(levels, table);
    for (int c = 0; c < chunks; c++)
        for (int half = 0; half < 2; half++) {
            __m512i w[4];
            const uint8_t* own = codes + c * lbllm::kChunkBytes + half * 64;
            if (kPlaced) {
                const __m512i placed[2] = {spread(levels + c * lbllm::kChunkPlaces), spread(levels + c * lbllm::kChunkPlaces + 16)};
                placed_levels_of(placed, half, own, w);
            } else {
                levels_of(table[half], own, w);
            }
            for (int k = 0; k < 4; k++) _mm512_store_si512(out + c * 512 + k * 128 + half * 64, w[k]);
        }
}

// acc += x . w. The intrinsic makes gcc 12 copy every accumulator of a loop with many; the instruction itself does not.
inline void accumulate(__m512i& acc, __m512i x, __m512i w) {
#if defined(__GNUC__) && defined(__AVX512VNNI__) && !defined(SIMDE_X86_AVX512VNNI_H)
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w));
#else
    acc = _mm512_dpbusd_epi32(acc, x, w);
#endif
}

// Sixteen int8 as floats.
inline __m512 floats_of(const int8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}

typedef __m512i Lanes;
constexpr int kPanelVectors = 2;

// a * b + c, rounded once.
inline __m512 fused(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }

// Dot products of a panel's rows with `kTokens` inputs, `stride` bytes apart. levels: [blocks][32 rows][4].
template <int kSafe>
inline void panel_dots(const int8_t* levels, const uint8_t* x, int64_t stride, int blocks, Lanes (*dot)[kPanelVectors]) {
    __m512i low[kTokens], high[kTokens];
    for (int t = 0; t < kTokens; t++) low[t] = high[t] = _mm512_setzero_si512();
    for (int block = 0; block < blocks; block++, levels += 128, x += 4) {
        const __m512i a = _mm512_load_si512(levels), b = _mm512_load_si512(levels + 64);
        for (int t = 0; t < kTokens; t++) {
            int32_t four;
            memcpy(&four, x + t * stride, 4);
            const __m512i in = _mm512_set1_epi32(four);
            accumulate(low[t], in, a);
            accumulate(high[t], in, b);
        }
    }
    for (int t = 0; t < kTokens; t++) dot[t][0] = low[t], dot[t][1] = high[t];
}

// 16 bytes of 4-bit codes to int8: those of the low nibbles, then those of the high ones.
inline void nibbles(const uint8_t* packed, const int8_t* value, int8_t* out) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
    const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(value)), low = _mm_set1_epi8(15);
    _mm_store_si128(reinterpret_cast<__m128i*>(out), _mm_shuffle_epi8(table, _mm_and_si128(v, low)));
    _mm_store_si128(reinterpret_cast<__m128i*>(out + 16), _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(v, 4), low)));
}

}  // namespace
