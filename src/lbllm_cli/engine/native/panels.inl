// Linears of many rows. A panel is several tiles, decoded once for all rows into an order in which every lane of a vector is an
// output row: its sums need no shuffles, and what is done once a group and token is done for all lanes of a panel at once. In the
// order of the tiles that took as long as the products themselves, at groups of 64.

namespace {

constexpr int64_t kWeightsPerThread = 1 << 17;  // times rows
constexpr int64_t kBlockRows = 128;             // rows whose sums stay in a core's cache

constexpr int kPanelRows = kLanes * kPanelVectors;
constexpr int kPanelTiles = kPanelRows / lbllm::kRows;
constexpr int kBlock = 4;  // columns whose products a lane adds at once

// Levels of all weights of a record: int8 [chunks][4][8][16].
inline void decode_record(const Layout& l, const uint8_t* record, int chunks, int8_t* out) {
    const uint8_t* codes = record + l.codes_at(chunks);
    const uint8_t* levels = record + lbllm::kLevelTable;
    if (l.placed)
        decode<true>(codes, levels, chunks, out);
    else
        decode<false>(codes, levels, chunks, out);
}

// Decoded levels of a tile, int8 [chunks][4][8][16], to [chunks * 16 blocks][8 rows][4 columns], blocks `stride` bytes apart.
inline void turn(const int8_t* decoded, int chunks, int64_t stride, int8_t* to) {
    for (int unit = 0; unit < chunks * 4; unit++, decoded += 128, to += 4 * stride)
        for (int row = 0; row < lbllm::kRows; row++)
            for (int block = 0; block < 4; block++)
                memcpy(to + block * stride + row * kBlock, decoded + row * 16 + block * kBlock, kBlock);
}

// A group of a panel: levels by blocks of columns, scales, sums of levels of each part.
struct Panel {
    alignas(64) float scale[kPanelRows], sum[lbllm::kMostParts][kPanelRows];
    int8_t* levels;  // [chunks * 16][kPanelRows][4]
    int8_t* decoded;

    // record: of the first tile, the next one a tile behind; tiles: how many there are, the rest is zeros.
    void read(const Layout& l, const uint8_t* record, int tiles, int chunks) {
        for (int t = 0; t < kPanelTiles; t++, record += l.tile) {
            int8_t* to = levels + t * lbllm::kRows * kBlock;
            if (t >= tiles) {
                for (int block = 0; block < chunks * 16; block++)
                    memset(to + block * kPanelRows * kBlock, 0, lbllm::kRows * kBlock);
                continue;
            }
            decode_record(l, record, chunks, decoded);
            turn(decoded, chunks, kPanelRows * kBlock, to);
            const v8f scales = halves(record);
            for (int row = 0; row < lbllm::kRows; row++) scale[t * lbllm::kRows + row] = scales[lbllm::place_of(row)];
            for (int part = 0; part < l.parts; part++) {
                const v8f sums = shorts(record + Layout::sums_at(part));
                for (int row = 0; row < lbllm::kRows; row++) sum[part][t * lbllm::kRows + row] = sums[lbllm::place_of(row)];
            }
        }
    }
};

// Adds a part of a panel's group to the outputs of `count` rows of inputs.
template <int kSafe>
void add_panel(const Layout& l, const Panel& panel, const Quantized& x, int g, int part, int64_t first, int64_t count, float* y) {
    Floats scale[kPanelVectors], sum[kPanelVectors];
    for (int v = 0; v < kPanelVectors; v++) {
        scale[v] = load<Floats>(panel.scale + v * kLanes);
        sum[v] = load<Floats>(panel.sum[part] + v * kLanes);
    }
    const int64_t at = (g * l.parts + part) * x.rows + first;
    const int blocks = l.chunks(g) * 16 / l.parts;
    const int8_t* levels = panel.levels + part * blocks * kPanelRows * kBlock;
    const uint8_t* in = x.at(l, g, first) + part * blocks * kBlock;
    for (int64_t m = 0; m < count; m += kTokens) {
        Lanes dot[kTokens][kPanelVectors];
        panel_dots<kSafe>(levels, in + m * l.input, l.input, blocks, dot);
        for (int64_t t = 0; t < kTokens && m + t < count; t++)
            for (int v = 0; v < kPanelVectors; v++) {
                // As add_part: every term in brackets is an exact integer.
                const Floats products = __builtin_convertvector((Integers)dot[t][v], Floats);
                const Floats exact = products - every(x.zeros[at + m + t]) * sum[v];
                float* to = y + (m + t) * kPanelRows + v * kLanes;
                store(to, fused(exact, scale[v] * every(x.steps[at + m + t]), load<Floats>(to)));
            }
    }
}

// Outputs of a panel for `count` rows of inputs: y [count, kPanelRows].
template <int kSafe>
void panel_rows(const Layout& l, const uint8_t* tile, int tiles, const Quantized& x, int64_t first, int64_t count, float* y) {
    static thread_local Scratch<int8_t> memory;
    Panel panel{};
    panel.levels = memory.of(l.input * (kPanelRows + lbllm::kRows));
    panel.decoded = panel.levels + l.input * kPanelRows;
    fill(y, y + count * kPanelRows, 0.0f);
    for (int g = 0; g < l.groups; g++) {
        panel.read(l, tile + static_cast<int64_t>(g) * l.record, tiles, l.chunks(g));
        for (int part = 0; part < l.parts; part++) add_panel<kSafe>(l, panel, x, g, part, first, count, y);
    }
}

template <int kSafe>
void multiply_panels(const lbllm_weights& w, const Layout& l, const Quantized& x, void* y, int dtype, int threads) {
    const int64_t panels = lbllm::ceil_div(l.tiles, kPanelTiles);
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t p = 0; p < panels; p++) {
        static thread_local Scratch<float> memory;
        float* sums = memory.of(kBlockRows * kPanelRows);
        const int tiles = static_cast<int>(smaller<int64_t>(kPanelTiles, l.tiles - p * kPanelTiles));
        const int64_t row = p * kPanelRows;
        const int n = static_cast<int>(smaller<int64_t>(kPanelRows, w.out_features - row));
        for (int64_t first = 0; first < x.rows; first += kBlockRows) {
            const int64_t count = smaller(kBlockRows, x.rows - first);
            panel_rows<kSafe>(l, w.tiles + p * kPanelTiles * l.tile, tiles, x, first, count, sums);
            for (int64_t m = 0; m < count; m++) {
                float* own = sums + m * kPanelRows;
                for (int i = 0; w.bias && i < n; i++) own[i] += w.bias[row + i];
                write_floats(own, n, y, dtype, (first + m) * w.out_features + row);
            }
        }
    }
}

}  // namespace
