// Dot products in plain C++: what a compiler makes of it on any processor.

namespace {

constexpr int kTokens = 1;  // tokens whose dot products are taken together

// The levels that a byte of places says, one to a byte.
struct Placed {
    int8_t of[256][lbllm::kLevels];

    constexpr Placed() : of() {
        for (int byte = 0; byte < 256; byte++) lbllm::levels_of_place(static_cast<uint8_t>(byte), of[byte]);
    }
};
constexpr Placed kPlacedLevels;

// Codes of `chunks` chunks of 8 rows to their levels: int8 [chunks][4][8][16]. levels: as a record has them, kPlaced: places.
template <bool kPlaced>
inline void decode(const uint8_t* codes, const uint8_t* levels, int chunks, int8_t* out) {
    typedef uint8_t v16u __attribute__((vector_size(16)));
    for (int c = 0; c < chunks; c++)
        for (int row = 0; row < lbllm::kRows; row++) {
            const v16u packed = load<v16u>(codes + (c * lbllm::kRows + row) * lbllm::kLane);
            for (int unit = 0; unit < 4; unit++) {
                const int8_t* l = kPlaced ? kPlacedLevels.of[levels[(c * lbllm::kUnits + unit) * lbllm::kRows + row]]
                                          : reinterpret_cast<const int8_t*>(levels) + row * lbllm::kLevels;
                v16u of[4];
                for (int k = 0; k < 4; k++) of[k] = v16u{} + static_cast<uint8_t>(l[k]);
                // Masks of all ones where the sign or the bitmap bit is set.
                const v16u sign = -((packed >> (2 * unit)) & 1), bitmap = -((packed >> (2 * unit + 1)) & 1);
                const v16u inner = (of[1] & sign) | (of[0] & ~sign), outer = (of[3] & sign) | (of[2] & ~sign);
                store(out + ((c * 4 + unit) * lbllm::kRows + row) * lbllm::kLane, (outer & bitmap) | (inner & ~bitmap));
            }
        }
}

typedef int16_t v8h __attribute__((vector_size(16)));
typedef int32_t v4i __attribute__((vector_size(16)));

// Eight int8 and uint8 to int16.
inline v8h wide(const int8_t* from) {
    typedef int8_t v8b __attribute__((vector_size(8)));
    return __builtin_convertvector(load<v8b>(from), v8h);
}

inline v8h wide(const uint8_t* from) {
    typedef uint8_t v8ub __attribute__((vector_size(8)));
    return __builtin_convertvector(load<v8ub>(from), v8h);
}

// Products of 16 columns in four int32. Two products of at most 127 * 127 fit in int16.
inline v4i products(v8h x0, v8h x1, const int8_t* w) {
#if defined(__SSE2__)
    return (v4i)_mm_madd_epi16((__m128i)x0, (__m128i)wide(w)) + (v4i)_mm_madd_epi16((__m128i)x1, (__m128i)wide(w + 8));
#else
    const v8h two = x0 * wide(w) + x1 * wide(w + 8);
    v4i four;
    for (int i = 0; i < 4; i++) four[i] = static_cast<int32_t>(two[i]) + two[4 + i];
    return four;
#endif
}

// Dot products of `units` times 16 columns of 8 decoded rows (in the order of scales) with one input.
inline v8i dots_decoded(const int8_t* w, const uint8_t* x, int units) {
    v4i total[8] = {};
    for (int u = 0; u < units; u++, w += 128) {
        const v8h x0 = wide(x + u * 16), x1 = wide(x + u * 16 + 8);
        for (int row = 0; row < 8; row++) total[row] += products(x0, x1, w + row * 16);
    }
    v8i out;
    for (int row = 0; row < 8; row++) out[lbllm::place_of(row)] = (total[row][0] + total[row][1]) + (total[row][2] + total[row][3]);
    return out;
}

// Dot products of 8 rows with one input, straight from the codes.
template <int kSafe, int kChunks, bool kPlaced>
inline v8i dots(const uint8_t* codes, const uint8_t* levels, const uint8_t* x, int chunks) {
    alignas(16) int8_t w[4 * 8 * 16];
    v8i total = {};
    for (int c = 0; c < (kChunks ? kChunks : chunks); c++) {
        decode<kPlaced>(codes + c * lbllm::kChunkBytes, levels + (kPlaced ? c * lbllm::kChunkPlaces : 0), 1, w);
        total += dots_decoded(w, x + c * lbllm::kChunk, lbllm::kUnits);
    }
    return total;
}

// The same of a chunk whose levels are places, for each of its parts.
template <int kSafe, int kParts>
inline void dots_of_parts(const uint8_t* codes, const uint8_t* places, const uint8_t* x, v8i* out) {
    alignas(16) int8_t w[4 * 8 * 16];
    decode<true>(codes, places, 1, w);
    constexpr int kCount = lbllm::kUnits / kParts;
    for (int part = 0; part < kParts; part++) out[part] = dots_decoded(w + part * kCount * 128, x + part * kCount * 16, kCount);
}

inline v8f floats_of(const int8_t* from) { return bytes(from); }

typedef v8i Lanes;
constexpr int kPanelVectors = 1;

// Dot products of a panel's rows with one input. levels: [blocks][8 rows][4].
template <int kSafe>
inline void panel_dots(const int8_t* levels, const uint8_t* x, int64_t, int blocks, Lanes (*dot)[kPanelVectors]) {
    v8i acc = {};
    for (int block = 0; block < blocks; block++, levels += 32)
        for (int row = 0; row < 8; row++)
            for (int i = 0; i < 4; i++) acc[row] += levels[row * 4 + i] * x[block * 4 + i];
    dot[0][0] = acc;
}

// 16 bytes of 4-bit codes to int8: those of the low nibbles, then those of the high ones.
inline void nibbles(const uint8_t* packed, const int8_t* value, int8_t* out) {
    for (int i = 0; i < 16; i++) {
        out[i] = value[packed[i] & 15];
        out[16 + i] = value[packed[i] >> 4];
    }
}

}  // namespace
