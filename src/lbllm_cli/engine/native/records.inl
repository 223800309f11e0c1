// Keys and values of the cache: quantized as they are written, decoded as they are read.

namespace {

// Records of keys or values: groups of `size` 4-bit codes, a bfloat16 step, a byte for the table (knee) or the zero (uniform).
struct Records {
    const lbllm_quantizer* q;
    int width, size, groups, codes, padded;  // padded: floats of a decoded record, 32 for every 16 bytes of codes

    Records(const lbllm_quantizer* quantizer, int head_dim)
        : q(quantizer),
          width(head_dim),
          size(quantizer->size),
          groups(static_cast<int>(lbllm::ceil_div(head_dim, size))),
          codes((size + 1) / 2),
          padded(static_cast<int>(lbllm::ceil_div(codes, 16)) * 32) {}

    int size_of() const { return groups * (codes + 3); }
    int floats() const { return groups * padded; }

    // Place of value i of a head in a decoded record: of each 16 bytes, the low nibbles come first.
    int place(int i) const {
        const int in = i % size;
        return i / size * padded + in / 32 * 32 + in % 2 * 16 + in % 32 / 2;
    }

    void write(const float* x, uint8_t* record) const {
        alignas(64) float values[256];
        alignas(64) int8_t lattice[512];
        for (int g = 0; g < groups; g++, record += codes + 3) {
            fill(values, values + padded_values(), 0.0f);
            memcpy(values, x + g * size, static_cast<size_t>(smaller(size, width - g * size)) * 4);
            const Group found = quantize_group(*q, values, padded_values(), lattice);
            memset(record, 0, static_cast<size_t>(codes));
            for (int i = 0; i < size; i++) {
                const int place = found.lattice[i] + found.zero, code = q->tables ? q->code[found.table][place] : place;
                record[i / 2] |= static_cast<uint8_t>(code << (i % 2 * 4));
            }
            const uint16_t step = to_bfloat16(found.step);
            memcpy(record + codes, &step, 2);
            record[codes + 2] = static_cast<uint8_t>(q->tables ? found.table : found.zero);
        }
    }

    int padded_values() const { return ::padded(size); }

    void read(const uint8_t* record, float* out) const { codes == 32 ? read<32>(record, out) : read<0>(record, out); }

    // Step times T - Z of all values, in decoded order. kCodes: bytes of a group's codes, 0: any number. Known when it is compiled it
    // takes 0.6 of the time.
    template <int kCodes>
    void read(const uint8_t* record, float* out) const {
        const int codes = kCodes ? kCodes : this->codes;
        for (int g = 0; g < groups; g++, record += codes + 3) {
            uint16_t stored;
            memcpy(&stored, record + codes, 2);
            const Floats step = every(from_bfloat16(stored));
            const int mark = record[codes + 2];
            const int8_t* value = q->value[q->tables ? mark & 1 : 0];
            const Floats shift = every(static_cast<float>(mark));
            for (int at = 0; at < codes; at += 16, out += 32) {
                alignas(16) uint8_t packed[16] = {};
                alignas(16) int8_t found[32];
                const bool whole = at + 16 <= codes;
                if (!whole) memcpy(packed, record + at, static_cast<size_t>(codes - at));
                nibbles(whole ? record + at : packed, value, found);
                for (int i = 0; i < 32; i += kLanes) {
                    const Floats lattice = (Floats)floats_of(found + i);
                    store(out + i, (q->tables ? lattice : lattice - shift) * step);
                }
            }
        }
    }
};

}  // namespace
