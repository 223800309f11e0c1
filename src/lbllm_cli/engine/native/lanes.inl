// Floats in vectors as wide as the tier's.

namespace {

typedef float Floats __attribute__((vector_size(sizeof(Lanes))));
typedef int32_t Integers __attribute__((vector_size(sizeof(Lanes))));

constexpr int kLanes = sizeof(Lanes) / 4;

inline Floats every(float x) { return Floats{} + x; }

// Lanes of a, then of b, by their numbers.
inline Floats picked(Floats a, Floats b, Integers lanes) {
#if defined(__clang__)
    Floats found;
    for (int i = 0; i < kLanes; i++) found[i] = lanes[i] < kLanes ? a[lanes[i]] : b[lanes[i] - kLanes];
    return found;
#else
    return __builtin_shuffle(a, b, lanes);
#endif
}

// Vectors of kLanes floats to their sums: sum i is that of vector i.
inline Floats sums_of(const Floats* x) {
    Integers even = {}, odd = {};
    for (int i = 0; i < kLanes; i++) even[i] = 2 * i, odd[i] = 2 * i + 1;
    Floats held[kLanes];
    for (int i = 0; i < kLanes; i++) held[i] = x[i];
    // Each round adds neighbours, of two vectors into one.
    for (int n = kLanes; n > 1; n /= 2)
        for (int i = 0; i < n / 2; i++) {
            const Floats a = held[2 * i], b = held[2 * i + 1];
            held[i] = picked(a, b, even) + picked(a, b, odd);
        }
    return held[0];
}

}  // namespace
