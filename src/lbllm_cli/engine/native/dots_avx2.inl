// Dot products on 256-bit vectors: two rows by 16 columns. A byte shuffle looks up levels. Its index is a nibble, two codes: one
// table of a row has the levels by the lower code, another by the upper one, so that one mask serves two lookups.
//
// maddubs adds two products of at most 127 * 127 in int16, which never saturates. kSafe is the number of such sums that still fit
// in int16: 4 for T <= 31, 2 for T <= 63, else 1. Nearly all fitted quantizers stay below 63.

namespace {

constexpr int kTokens = 2;  // whose dot products are taken together

inline __m256i both_lanes(const uint8_t* x) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}

// Places of a chunk to levels: [4][8] -> int8 [4][8][4]. A byte is spread over four; by its halves means and half-widths of the inner
// pair are looked up for two of them, of the outer pair for the others.
inline void spread(const uint8_t* places, int8_t* levels) {
    const __m256i low = _mm256_set1_epi8(15), sign = _mm256_set1_epi16(0x01ff);
    const __m256i each = _mm256_set_epi32(0x07070707, 0x06060606, 0x05050505, 0x04040404, 0x03030303, 0x02020202, 0x01010101, 0);
    __m256i table[4];
    for (int pair = 0; pair < lbllm::kPairs; pair++) {
        table[pair] = both_lanes(reinterpret_cast<const uint8_t*>(lbllm::kMeans[pair]));
        table[2 + pair] = both_lanes(reinterpret_cast<const uint8_t*>(lbllm::kHalfWidths[pair]));
    }
    for (int unit = 0; unit < lbllm::kUnits; unit++) {
        const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(places + unit * lbllm::kRows));
        const __m256i byte = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(eight), each);
        const __m256i of_mean = _mm256_and_si256(byte, low), of_half = _mm256_and_si256(_mm256_srli_epi16(byte, 4), low);
        const __m256i inner = _mm256_shuffle_epi8(table[0], of_mean), outer = _mm256_shuffle_epi8(table[1], of_mean);
        const __m256i near = _mm256_shuffle_epi8(table[2], of_half), far = _mm256_shuffle_epi8(table[3], of_half);
        const __m256i half = _mm256_sign_epi8(_mm256_blend_epi16(near, far, 0xAA), sign);
        const __m256i found = _mm256_add_epi8(_mm256_blend_epi16(inner, outer, 0xAA), half);
        _mm256_store_si256(reinterpret_cast<__m256i*>(levels + unit * lbllm::kRows * lbllm::kLevels), found);
    }
}

// Levels of all chunks of a group.
struct Placed {
    alignas(32) int8_t levels[lbllm::kMostChunks * lbllm::kChunkLevels];

    Placed(const uint8_t* places, int chunks) {
        for (int c = 0; c < chunks; c++) spread(places + c * lbllm::kChunkPlaces, levels + c * lbllm::kChunkLevels);
    }
};

// Level tables of a pair of rows: by the lower code of a nibble (each level four times over), and by the upper one.
struct Tables {
    __m256i lower, upper;
};

inline void tables_of(const uint8_t* levels, Tables table[4]) {
    const __m256i rows = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(levels));
    const __m256i upper = _mm256_set_epi32(0x03030303, 0x02020202, 0x01010101, 0, 0x03030303, 0x02020202, 0x01010101, 0);
    for (int p = 0; p < 4; p++) {
        const __m256i pair = _mm256_set_epi32(2 * p + 1, 2 * p + 1, 2 * p + 1, 2 * p + 1, 2 * p, 2 * p, 2 * p, 2 * p);
        table[p].lower = _mm256_permutevar8x32_epi32(rows, pair);
        table[p].upper = _mm256_shuffle_epi8(table[p].lower, upper);
    }
}

// Levels of four vectors of columns.
inline void levels_of(const Tables& table, const uint8_t* codes, __m256i w[4]) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)), nibble = _mm256_set1_epi8(15);
    const __m256i low = _mm256_and_si256(v, nibble), high = _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble);
    w[0] = _mm256_shuffle_epi8(table.lower, low);
    w[1] = _mm256_shuffle_epi8(table.upper, low);
    w[2] = _mm256_shuffle_epi8(table.lower, high);
    w[3] = _mm256_shuffle_epi8(table.upper, high);
}

// The same where each vector has levels of its own. levels: int8 [4][8][4]; p: which pair of rows.
inline void placed_levels_of(const int8_t* levels, int p, const uint8_t* codes, __m256i w[4]) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)), nibble = _mm256_set1_epi8(15);
    const __m256i index[2] = {_mm256_and_si256(v, nibble), _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble)};
    const __m256i lower = _mm256_set_epi32(0x07060504, 0x07060504, 0x07060504, 0x07060504, 0x03020100, 0x03020100, 0x03020100, 0x03020100);
    const __m256i upper = _mm256_set_epi32(0x07070707, 0x06060606, 0x05050505, 0x04040404, 0x03030303, 0x02020202, 0x01010101, 0);
    for (int k = 0; k < 4; k++) {
        const __m128i pair = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(levels + (k * lbllm::kRows + 2 * p) * lbllm::kLevels));
        const __m256i table = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(pair), k % 2 ? upper : lower);
        w[k] = _mm256_shuffle_epi8(table, index[k / 2]);
    }
}

// acc + the products of four vectors of columns: w[k] are levels, x[k] inputs.
template <int kSafe>
inline __m256i multiply_add(__m256i acc, const __m256i x[4], const __m256i w[4]) {
#if defined(LBLLM_DPBUSD)
    return LBLLM_DPBUSD(LBLLM_DPBUSD(LBLLM_DPBUSD(LBLLM_DPBUSD(acc, x[0], w[0]), x[1], w[1]), x[2], w[2]), x[3], w[3]);
#else
    const __m256i ones = _mm256_set1_epi16(1);
    const __m256i a = _mm256_maddubs_epi16(x[0], w[0]), b = _mm256_maddubs_epi16(x[1], w[1]);
    const __m256i c = _mm256_maddubs_epi16(x[2], w[2]), d = _mm256_maddubs_epi16(x[3], w[3]);
    if (kSafe >= 4) {
        const __m256i four = _mm256_add_epi16(_mm256_add_epi16(a, b), _mm256_add_epi16(c, d));
        return _mm256_add_epi32(acc, _mm256_madd_epi16(four, ones));
    }
    if (kSafe >= 2) {
        acc = _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_add_epi16(a, b), ones));
        return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_add_epi16(c, d), ones));
    }
    acc = _mm256_add_epi32(_mm256_add_epi32(acc, _mm256_madd_epi16(a, ones)), _mm256_madd_epi16(b, ones));
    return _mm256_add_epi32(_mm256_add_epi32(acc, _mm256_madd_epi16(c, ones)), _mm256_madd_epi16(d, ones));
#endif
}

// Dot products of 8 rows (in the order of scales) with one input, straight from the codes. Two rows after the other, with the number
// of chunks known where it can be: with all rows side by side accumulators spill, and it takes a tenth longer.
template <int kSafe, int kChunks, bool kPlaced>
inline v8i dots(const uint8_t* codes, const uint8_t* levels, const uint8_t* x, int chunks) {
    Tables table[4];
    __m256i sums[4], w[4];
    Placed placed(kPlaced ? levels : nullptr, kPlaced ? chunks : 0);
    if (!kPlaced) tables_of(levels, table);
    for (int p = 0; p < 4; p++) {
        __m256i acc = _mm256_setzero_si256();
        for (int c = 0; c < (kChunks ? kChunks : chunks); c++) {
            const uint8_t* in = x + c * lbllm::kChunk;
            const __m256i quad[4] = {both_lanes(in), both_lanes(in + 16), both_lanes(in + 32), both_lanes(in + 48)};
            const uint8_t* own = codes + c * lbllm::kChunkBytes + p * 32;
            if (kPlaced)
                placed_levels_of(placed.levels + c * lbllm::kChunkLevels, p, own, w);
            else
                levels_of(table[p], own, w);
            acc = multiply_add<kSafe>(acc, quad, w);
        }
        sums[p] = acc;
    }
    return row_sums(sums[0], sums[1], sums[2], sums[3]);
}

// Products of 1 or 2 vectors of columns.
template <int kSafe, int kCount>
inline __m256i products(const __m256i* x, const __m256i* w) {
#if defined(LBLLM_DPBUSD)
    const __m256i first = LBLLM_DPBUSD(_mm256_setzero_si256(), x[0], w[0]);
    return kCount == 1 ? first : LBLLM_DPBUSD(first, x[kCount - 1], w[kCount - 1]);
#else
    const __m256i ones = _mm256_set1_epi16(1), a = _mm256_maddubs_epi16(x[0], w[0]);
    if (kCount == 1) return _mm256_madd_epi16(a, ones);
    const __m256i b = _mm256_maddubs_epi16(x[kCount - 1], w[kCount - 1]);
    if (kSafe >= 2) return _mm256_madd_epi16(_mm256_add_epi16(a, b), ones);
    return _mm256_add_epi32(_mm256_madd_epi16(a, ones), _mm256_madd_epi16(b, ones));
#endif
}

// Dot products of a chunk whose levels are places, for each of its parts.
template <int kSafe, int kParts>
inline void dots_of_parts(const uint8_t* codes, const uint8_t* places, const uint8_t* x, v8i* out) {
    const __m256i quad[4] = {both_lanes(x), both_lanes(x + 16), both_lanes(x + 32), both_lanes(x + 48)};
    const Placed placed(places, 1);
    __m256i sums[kParts][4], w[4];
    for (int p = 0; p < 4; p++) {
        placed_levels_of(placed.levels, p, codes + p * 32, w);
        for (int part = 0; part < kParts; part++) {
            constexpr int kCount = 4 / kParts;
            sums[part][p] = products<kSafe, kCount>(quad + part * kCount, w + part * kCount);
        }
    }
    for (int part = 0; part < kParts; part++) out[part] = row_sums(sums[part][0], sums[part][1], sums[part][2], sums[part][3]);
}

// Codes of `chunks` chunks of 8 rows to their levels: int8 [chunks][4][8][16]. levels: as a record has them, kPlaced: places.
template <bool kPlaced>
inline void decode(const uint8_t* codes, const uint8_t* levels, int chunks, int8_t* out) {
    Tables table[4];
    Placed placed(kPlaced ? levels : nullptr, kPlaced ? chunks : 0);
    if (!kPlaced) tables_of(levels, table);
    for (int c = 0; c < chunks; c++)
        for (int p = 0; p < 4; p++) {
            __m256i w[4];
            const uint8_t* own = codes + c * lbllm::kChunkBytes + p * 32;
            if (kPlaced)
                placed_levels_of(placed.levels + c * lbllm::kChunkLevels, p, own, w);
            else
                levels_of(table[p], own, w);
            for (int k = 0; k < 4; k++) _mm256_store_si256(reinterpret_cast<__m256i*>(out + c * 512 + k * 128 + p * 32), w[k]);
        }
}

inline v8f floats_of(const int8_t* from) { return bytes(from); }

typedef __m256i Lanes;
constexpr int kPanelVectors = 2;

// Dot products of a panel's rows with `kTokens` inputs, `stride` bytes apart. levels: [blocks][16 rows][4], blocks a multiple of 16.
template <int kSafe>
inline void panel_dots(const int8_t* levels, const uint8_t* x, int64_t stride, int blocks, Lanes (*dot)[kPanelVectors]) {
    __m256i acc[kTokens][kPanelVectors] = {};
    for (int block = 0; block < blocks; block += 4, levels += 256, x += 16) {
        const __m256i* w = reinterpret_cast<const __m256i*>(levels);
        for (int t = 0; t < kTokens; t++) {
            __m256i quad[4];
            for (int k = 0; k < 4; k++) {
                int32_t four;
                memcpy(&four, x + t * stride + 4 * k, 4);
                quad[k] = _mm256_set1_epi32(four);
            }
            for (int v = 0; v < kPanelVectors; v++) {
                const __m256i rows[4] = {w[v], w[2 + v], w[4 + v], w[6 + v]};
                acc[t][v] = multiply_add<kSafe>(acc[t][v], quad, rows);
            }
        }
    }
    for (int t = 0; t < kTokens; t++)
        for (int v = 0; v < kPanelVectors; v++) dot[t][v] = acc[t][v];
}

// 16 bytes of 4-bit codes to int8: those of the low nibbles, then those of the high ones.
inline void nibbles(const uint8_t* packed, const int8_t* value, int8_t* out) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
    const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(value)), low = _mm_set1_epi8(15);
    _mm_store_si128(reinterpret_cast<__m128i*>(out), _mm_shuffle_epi8(table, _mm_and_si128(v, low)));
    _mm_store_si128(reinterpret_cast<__m128i*>(out + 16), _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(v, 4), low)));
}

}  // namespace
