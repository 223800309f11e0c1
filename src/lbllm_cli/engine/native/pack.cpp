// Canonical codes to tiles and back.
#include <string.h>

#include "checks.h"
#include "layout.h"

using namespace lbllm;

namespace {

// Code of column c of a group whose packed bytes begin at `bytes`.
inline int code_at(const uint8_t* bytes, int c) { return bytes[c / 4] >> (c % 4 * 2) & 3; }

// The four codes of every byte, one to a byte.
struct Spread {
    uint32_t of[256];

    constexpr Spread() : of() {
        for (uint32_t byte = 0; byte < 256; byte++)
            for (int i = 0; i < 4; i++) of[byte] |= (byte >> (2 * i) & 3) << (8 * i);
    }
};
constexpr Spread kSpread;

// Where pairs lie in their tables. Outer means are all different, and so are outer half-widths plus twice the inner ones.
struct Places {
    uint8_t mean[128], half[128];

    constexpr Places() : mean(), half() {
        for (uint8_t i = 0; i < kEntries; i++) {
            mean[kMeans[1][i] & 127] = i;
            half[(kHalfWidths[1][i] + 2 * kHalfWidths[0][i]) & 127] = i;
        }
    }
};
constexpr Places kPlaces;

// The byte of four levels, in code order: below and above the mean of each pair in turn.
inline uint8_t place_of_levels(const int8_t* l) {
    return static_cast<uint8_t>(kPlaces.mean[(l[2] + l[3]) / 2 & 127] | kPlaces.half[((l[3] - l[2]) / 2 + l[1] - l[0]) & 127] << 4);
}

// What a row of a linear is made of, as a checkpoint has it, in groups of `size`.
struct Row {
    const uint8_t* codes;
    const int8_t* levels;
    const uint16_t* scale;
    int size;

    const int8_t* levels_at(int column) const { return levels + column / size * kLevels; }
};

// Sum of the levels of 16 columns, whose codes are 4 bytes.
inline int sum_of(const uint8_t* bytes, const int8_t* levels) {
    uint32_t word;
    memcpy(&word, bytes, 4);
    const uint32_t each = 0x55555555u, sign = word & each, bitmap = word >> 1 & each;
    const int both = __builtin_popcount(sign & bitmap), signs = __builtin_popcount(sign), bitmaps = __builtin_popcount(bitmap);
    return (16 - signs - bitmaps + both) * levels[0] + (signs - both) * levels[1] + (bitmaps - both) * levels[2] + both * levels[3];
}

// A whole chunk of a row, 16 bytes from a column on, to its 16 bytes in the tile; adds the levels of each unit of 16 columns to the
// sum of its part, of which a chunk has `parts`. Code by code a gigabyte of weights took two seconds.
void pack_chunk(const Row& from, int column, uint8_t* to, int parts, int* sums) {
    const uint8_t* bytes = from.codes + column / 4;
    uint32_t codes[16];
    for (int i = 0; i < 16; i++) codes[i] = kSpread.of[bytes[i]];
    for (int i = 0; i < 4; i++) {
        const uint32_t four = codes[i] | codes[4 + i] << 2 | codes[8 + i] << 4 | codes[12 + i] << 6;
        memcpy(to + 4 * i, &four, 4);
        sums[i * parts / kUnits] += sum_of(bytes + 4 * i, from.levels_at(column + i * kLane));
    }
}

// A group of `columns` from `first` on. Where levels are places, those of each 16 columns are written down.
void pack_row(const Layout& l, int g, int row, const Row& from, uint8_t* record) {
    const int first = g * l.group;
    const uint8_t* bytes = from.codes + first / 4;
    memcpy(record + place_of(row) * 2, from.scale + first / from.size, 2);
    if (l.placed) {
        for (int c = 0; c < l.columns(g); c += kLane)
            record[kLevelTable + c / kLane * kRows + row] = place_of_levels(from.levels_at(first + c));
    } else {
        memcpy(record + kLevelTable + row * kLevels, from.levels_at(first), kLevels);
    }
    int sums[kMostParts] = {}, c = 0;
    uint8_t* codes = record + l.codes(g) + row * kLane;
    for (; c + kChunk <= l.columns(g); c += kChunk) pack_chunk(from, first + c, codes + c / kChunk * kChunkBytes, l.parts, sums);
    for (; c < l.columns(g); c++) {
        const int code = code_at(bytes, c), place = c % kChunk;
        codes[c / kChunk * kChunkBytes + place % kLane] |= static_cast<uint8_t>(code << (place / kLane * 2));
        sums[c / l.step] += from.levels_at(first + c)[code];
    }
    for (int part = 0; part < l.parts; part++) {
        const int16_t stored = static_cast<int16_t>(sums[part]);  // at most 256 * 127
        memcpy(record + Layout::sums_at(part) + place_of(row) * 2, &stored, 2);
    }
}

}  // namespace

LBLLM_EXPORT int64_t lbllm_tiles_bytes(int32_t in_features, int32_t out_features, int32_t group_size, int32_t level_group) {
    if (!sizes(in_features, out_features, group_size, level_group)) return -1;
    const Layout l(in_features, out_features, group_size, level_group);
    return l.tiles * l.tile;
}

LBLLM_EXPORT int32_t lbllm_pack(const uint8_t* weight, const int8_t* levels, const uint16_t* scale, int32_t in_features,
                                int32_t out_features, int32_t group_size, int32_t level_group, uint8_t* tiles, int32_t threads) {
    if (!sizes(in_features, out_features, group_size, level_group) || !weight || !levels || !scale || !tiles || threads < 1)
        return LBLLM_BAD_SIZE;
    const Layout l(in_features, out_features, group_size, level_group);
    const int size = level_group ? level_group : group_size;
    const int64_t groups = ceil_div(in_features, size);
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < l.tiles; t++) {
        uint8_t* tile = tiles + t * l.tile;
        memset(tile, 0, static_cast<size_t>(l.tile));
        for (int row = 0; row < kRows && t * kRows + row < out_features; row++) {
            const int64_t at = (t * kRows + row) * groups;
            const Row from{weight + at * (size / 4), levels + at * kLevels, scale + at, size};
            for (int g = 0; g < l.groups; g++) pack_row(l, g, row, from, tile + static_cast<int64_t>(g) * l.record);
        }
    }
    return LBLLM_OK;
}

LBLLM_EXPORT int32_t lbllm_unpack(const lbllm_weights* weights, int32_t first, int32_t count, uint8_t* weight, int8_t* levels,
                                  uint16_t* scale) {
    if (!good(weights) || !weight || !levels || !scale || first < 0 || count < 0 || count > weights->out_features - first)
        return LBLLM_BAD_SIZE;
    const Layout l(weights->in_features, weights->out_features, weights->group_size, weights->level_group);
    const int size = l.placed ? weights->level_group : l.group;
    const int64_t groups = ceil_div(l.in, size);
    memset(weight, 0, static_cast<size_t>(count * groups * (size / 4)));
    for (int r = 0; r < count; r++) {
        const int row = (first + r) % kRows;
        const uint8_t* tile = weights->tiles + (first + r) / kRows * l.tile;
        uint8_t* codes = weight + r * groups * (size / 4);
        for (int64_t at = 0; at < groups; at++) {
            const int column = static_cast<int>(at) * size, g = column / l.group;
            const uint8_t* record = tile + static_cast<int64_t>(g) * l.record;
            memcpy(scale + r * groups + at, record + place_of(row) * 2, 2);
            int8_t* to = levels + (r * groups + at) * kLevels;
            const int unit = column % l.group / kLane;
            if (l.placed)
                levels_of_place(record[kLevelTable + unit * kRows + row], to);
            else
                memcpy(to, record + kLevelTable + row * kLevels, kLevels);
        }
        for (int c = 0; c < l.in; c++) {
            const int g = c / l.group, inside = c % l.group, place = inside % kChunk;
            const uint8_t* own = tile + static_cast<int64_t>(g) * l.record + l.codes(g) + inside / kChunk * kChunkBytes + row * kLane;
            codes[c / 4] |= static_cast<uint8_t>((own[place % kLane] >> (place / kLane * 2) & 3) << (c % 4 * 2));
        }
    }
    return LBLLM_OK;
}
