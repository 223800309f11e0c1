// The next token from logits.
#include <math.h>

#include <algorithm>
#include <vector>

#include "checks.h"

namespace {

// SplitMix64: a state of 64 bits that may be any number.
uint64_t next_bits(uint64_t* state) {
    uint64_t z = *state += 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

// In 0 .. 1, 1 left out.
double uniform(uint64_t* state) { return static_cast<double>(next_bits(state) >> 11) * 0x1p-53; }

struct Candidate {
    float logit;
    int32_t token;
};

// The likelier one first; on a tie the smaller token, so that a drawn token depends on logits alone.
bool before_it(const Candidate& a, const Candidate& b) {
    return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
}

// Logits of tokens that were there, each once however often it was.
void penalize(float* logits, int32_t vocab, float penalty, const int32_t* before, int64_t count) {
    std::vector<int32_t> seen(before, before + count);
    std::sort(seen.begin(), seen.end());
    seen.erase(std::unique(seen.begin(), seen.end()), seen.end());
    for (const int32_t token : seen)
        if (token >= 0 && token < vocab) logits[token] = logits[token] > 0 ? logits[token] / penalty : logits[token] * penalty;
}

struct Chances {
    std::vector<double> of;  // of the first candidates, not divided by their sum
    double total;
};

// Leaves the candidates that the settings leave in front. They are sorted as far as somebody asks: all tokens of a large vocabulary
// would take longer than the model's head.
Chances chances_of(std::vector<Candidate>& candidates, const lbllm_sampling* s) {
    if (s->top_k && static_cast<size_t>(s->top_k) < candidates.size()) {
        std::partial_sort(candidates.begin(), candidates.begin() + s->top_k, candidates.end(), before_it);
        candidates.resize(static_cast<size_t>(s->top_k));
    }
    const float top = std::min_element(candidates.begin(), candidates.end(), before_it)->logit;
    const auto chance_of = [&](const Candidate& c) { return exp((static_cast<double>(c.logit) - top) / s->temperature); };
    Chances found{{}, 0};
    if (s->top_p < 1) {
        double all = 0;
        for (const Candidate& candidate : candidates) all += chance_of(candidate);
        size_t sorted = 0;
        while (found.of.size() < candidates.size() && (found.of.empty() || found.total < s->top_p * all)) {
            if (found.of.size() == sorted) {
                const size_t more = std::min(candidates.size(), std::max<size_t>(64, 2 * sorted));
                std::partial_sort(candidates.begin() + static_cast<long>(sorted), candidates.begin() + static_cast<long>(more),
                                  candidates.end(), before_it);
                sorted = more;
            }
            found.of.push_back(chance_of(candidates[found.of.size()]));
            found.total += found.of.back();
        }
        candidates.resize(found.of.size());
        found = {{}, 0};
    }
    const auto rare = [&](const Candidate& candidate) { return chance_of(candidate) < s->min_p; };
    candidates.erase(std::remove_if(candidates.begin(), candidates.end(), rare), candidates.end());
    for (const Candidate& candidate : candidates) {
        found.of.push_back(chance_of(candidate));
        found.total += found.of.back();
    }
    return found;
}

}  // namespace

LBLLM_EXPORT int32_t lbllm_sample(const lbllm_sampling* sampling, float* logits, int32_t vocab, const int32_t* before,
                                  int64_t count, uint64_t* state, int32_t* token) {
    if (!good(sampling) || !logits || vocab < 1 || count < 0 || (count && !before) || !state || !token) return LBLLM_BAD_SIZE;
    float largest = logits[0];
    // Not the largest alone: comparisons pass over what is not a number.
    for (int32_t i = 0; i < vocab; i++) {
        if (isnan(logits[i])) return LBLLM_NOT_FINITE;
        largest = std::max(largest, logits[i]);
    }
    if (!isfinite(largest)) return LBLLM_NOT_FINITE;
    if (sampling->penalty != 1.0f) penalize(logits, vocab, sampling->penalty, before, count);
    if (sampling->temperature == 0.0f) {
        *token = static_cast<int32_t>(std::max_element(logits, logits + vocab) - logits);
        return LBLLM_OK;
    }
    std::vector<Candidate> candidates(static_cast<size_t>(vocab));
    for (int32_t i = 0; i < vocab; i++) candidates[static_cast<size_t>(i)] = {logits[i], i};
    const Chances chances = chances_of(candidates, sampling);
    double left = uniform(state) * chances.total;
    size_t drawn = 0;
    while (drawn + 1 < chances.of.size() && left >= chances.of[drawn]) left -= chances.of[drawn++];
    *token = candidates[drawn].token;
    return LBLLM_OK;
}
