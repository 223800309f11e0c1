// How weights lie in memory: tiles of 8 rows, one record per group, read once from front to back.
//
// record: scale float16 [8], sum of levels int16 [8], levels int8 [8][4], codes [chunks][8][16]
//
// or, of levels out of a table (format/level_table.py), whose groups are smaller than those that share a step:
//
// record: scale float16 [8], sum of levels int16 [8], places [chunks][4][8], codes [chunks][8][16]
//
// where a byte says the four levels of 16 columns of a row. The scale is the row's, in every record. A record is then of at least
// 64 columns: where 16 or 32 of them share a step, it has several parts, one for each step. They share scale and codes, and have
// sums of their own, int16 [8] each, of which all but the first lie behind the places.
//
// Scales and sums come in the order of rows 0 2 4 6 1 3 5 7: two rows share a vector of products, one in each 128-bit half, and
// sums within halves leave four such vectors in this order.
//
// A chunk is 64 columns. Byte j of a row's 16 holds the codes of columns j, 16 + j, 32 + j and 48 + j of the chunk, the first in the
// low bits: four shifts and masks give four vectors of consecutive columns. A row fills a 128-bit lane, so that a byte shuffle
// looks up its levels, with columns in order for the input: one load serves all rows. A group that is no multiple of 64 columns
// is padded; the input has T = 0 there.
#pragma once
#include <stdint.h>

// Unnamed, as everything in the tiers is: a function with one copy for all of them could be the AVX-512 one on any processor.
namespace {
namespace lbllm {

constexpr int kRows = 8;
constexpr int kChunk = 64;
constexpr int kLane = 16;
constexpr int kLevels = 4;
constexpr int kSums = kRows * 2;
constexpr int kLevelTable = kSums + kRows * 2;
constexpr int kChunkBytes = kRows * kLane;
constexpr int kUnits = kChunk / kLane;  // of 16 columns, which share a byte of places
constexpr int kChunkPlaces = kUnits * kRows;
constexpr int kChunkLevels = kUnits * kRows * kLevels;
constexpr int kMostChunks = 4;  // of a group
constexpr int kMostParts = 4;

// Of levels out of a table, the inner pair and the outer one: means by the low half of a byte, half-widths by the high half.
constexpr int kPairs = 2, kEntries = 16;
alignas(16) constexpr int8_t kMeans[kPairs][kEntries] = {{-1, 5, 3, 9, 7, 13, 13, 19, 1, -5, -3, -9, -7, -13, -13, -19},
                                                         {3, 2, 9, 8, 17, 14, 28, 23, -3, -2, -9, -8, -17, -14, -28, -23}};
alignas(16) constexpr int8_t kHalfWidths[kPairs][kEntries] = {{7, 7, 10, 8, 12, 9, 12, 9, 15, 11, 15, 11, 17, 13, 17, 15},
                                                              {23, 26, 29, 31, 33, 35, 38, 41, 41, 45, 48, 51, 55, 60, 72, 99}};

// The levels that a byte says, in code order: below and above the mean of each pair in turn.
constexpr void levels_of_place(uint8_t place, int8_t levels[kLevels]) {
    for (int code = 0; code < kLevels; code++) {
        const int mean = kMeans[code / 2][place & 15], half = kHalfWidths[code / 2][place >> 4];
        levels[code] = static_cast<int8_t>(code % 2 ? mean + half : mean - half);
    }
}

// Place of a row among the scales and sums of its tile.
inline int place_of(int row) { return row % 2 * 4 + row / 2; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Layout {
    int in, out;
    bool placed;      // levels come out of a table
    int parts, step;  // of a group, and columns of each
    int group;
    // Worked out once: divisions in the loop over groups cost more than the products of a group of 64.
    int groups, last_columns, full_chunks, last_chunks;
    int record;   // bytes of a group that is not the last
    int64_t tile, tiles;
    int input;  // bytes of a group's input, padded

    // group_size: inputs that share a step.
    Layout(int in_features, int out_features, int group_size, int level_group)
        : in(in_features),
          out(out_features),
          placed(level_group > 0),
          parts(placed && kChunk % group_size == 0 ? kChunk / group_size : 1),
          step(group_size),
          group(step * parts),
          groups(static_cast<int>(ceil_div(in, group))),
          last_columns(in - (groups - 1) * group),
          full_chunks(static_cast<int>(ceil_div(group, kChunk))),
          last_chunks(static_cast<int>(ceil_div(last_columns, kChunk))),
          record(codes_at(full_chunks) + full_chunks * kChunkBytes),
          tile(static_cast<int64_t>(groups - 1) * record + codes_at(last_chunks) + last_chunks * kChunkBytes),
          tiles(ceil_div(out, kRows)),
          input(full_chunks * kChunk) {}

    int columns(int g) const { return g + 1 < groups ? group : last_columns; }
    // Where the codes of a record begin.
    int codes_at(int chunks) const {
        return kLevelTable + (placed ? chunks * kChunkPlaces + (parts - 1) * kRows * 2 : kRows * kLevels);
    }
    // Where the sums of a part begin.
    static int sums_at(int part) { return part == 0 ? kSums : kLevelTable + kChunkPlaces + (part - 1) * kRows * 2; }
    int steps() const { return static_cast<int>(ceil_div(in, step)); }
    int columns_of_step(int s) const { return s + 1 < steps() ? step : in - s * step; }
    int codes(int g) const { return codes_at(chunks(g)); }
    int chunks(int g) const { return g + 1 < groups ? full_chunks : last_chunks; }
};

}  // namespace lbllm
}  // namespace
