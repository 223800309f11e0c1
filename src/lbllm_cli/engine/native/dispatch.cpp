// Chooses a tier when the library is loaded; the functions of the ABI that depend on it.
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "checks.h"
#include "tier.h"

namespace {

using lbllm::Tier;

#if defined(__x86_64__)
// Asked of the processor: not every gcc and clang knows these two by name.
bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && c >> 29 & 1;
}

[[maybe_unused]] bool has_avxvnni() {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1;
}
#endif

// What this CPU can run, best first.
int available(const Tier* tiers[4]) {
    int n = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
#if defined(LBLLM_HAVE_AVX512)
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma"))
        tiers[n++] = &lbllm::tier_avx512;
#endif
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
#if defined(LBLLM_HAVE_AVXVNNI)
    if (avx2 && has_avxvnni()) tiers[n++] = &lbllm::tier_avxvnni;
#endif
#if defined(LBLLM_HAVE_AVX2)
    if (avx2) tiers[n++] = &lbllm::tier_avx2;
#endif
#endif
    tiers[n++] = &lbllm::tier_portable;
    return n;
}

const Tier* best() {
    const Tier* tiers[4];
    available(tiers);
    return tiers[0];
}

const Tier*& current() {
    static const Tier* chosen = best();
    return chosen;
}

}  // namespace

LBLLM_EXPORT int32_t lbllm_abi(void) { return 6; }

LBLLM_EXPORT const char* lbllm_tier(void) { return current()->name; }

LBLLM_EXPORT int32_t lbllm_choose_tier(const char* name) {
    const Tier* tiers[4];
    const int n = available(tiers);
    for (int i = 0; i < n; i++)
        if (strcmp(tiers[i]->name, name) == 0) {
            current() = tiers[i];
            return 0;
        }
    return -1;
}

LBLLM_EXPORT int32_t lbllm_quantize(const lbllm_quantizer* quantizer, const void* x, int32_t dtype, int64_t rows, int32_t width,
                                    uint8_t* places, float* values, float* steps, int32_t* zeros, int32_t* tables,
                                    int32_t step_dtype, int32_t threads) {
    if (!good(quantizer)) return LBLLM_BAD_QUANTIZER;
    if (!known(dtype) || !known(step_dtype)) return LBLLM_BAD_TYPE;
    if (rows < 0 || width < 1 || threads < 1) return LBLLM_BAD_SIZE;
    if (rows && (!x || !steps || !zeros || !tables)) return LBLLM_BAD_SIZE;
    if (rows) current()->quantize(quantizer, x, dtype, rows, width, places, values, steps, zeros, tables, step_dtype, threads);
    return LBLLM_OK;
}

LBLLM_EXPORT int32_t lbllm_quantize_backward(const lbllm_quantizer* quantizer, const void* x, int32_t dtype, int64_t groups,
                                             const float* values, const float* steps, const int32_t* zeros,
                                             const int32_t* tables, const float* gradient, float* inputs, float* sums,
                                             int32_t threads) {
    if (!good(quantizer)) return LBLLM_BAD_QUANTIZER;
    if (!known(dtype)) return LBLLM_BAD_TYPE;
    if (groups < 0 || threads < 1 || (groups && (!x || !values || !steps || !zeros || !tables || !gradient))) return LBLLM_BAD_SIZE;
    for (int64_t at = 0; at < groups; at++)
        if (tables[at] < 0 || tables[at] > 1) return LBLLM_BAD_SIZE;
    if (groups)
        current()->quantize_backward(quantizer, x, dtype, groups, values, steps, zeros, tables, gradient, inputs, sums, threads);
    return LBLLM_OK;
}

LBLLM_EXPORT int32_t lbllm_linear(const lbllm_weights* weights, const lbllm_quantizer* quantizer, const void* x, void* y,
                                  int32_t dtype, int64_t rows, int32_t threads) {
    if (!good(weights) || rows < 0 || threads < 1 || (rows && (!x || !y))) return LBLLM_BAD_SIZE;
    if (quantizer && !fits(quantizer, *weights)) return LBLLM_BAD_QUANTIZER;
    if (!known(dtype)) return LBLLM_BAD_TYPE;
    if (rows) current()->linear(weights, quantizer, x, y, dtype, rows, threads);
    return LBLLM_OK;
}

LBLLM_EXPORT int32_t lbllm_block_step(const lbllm_block* block, const lbllm_cache* cache, const void* in, void* out,
                                      const void* cosine, const void* sine, int32_t dtype, int64_t rows, int32_t threads) {
    if (const int32_t wrong = check(block)) return wrong;
    if (!known(dtype)) return LBLLM_BAD_TYPE;
    if (rows < 0 || threads < 1 || rows * block->hidden > kLargest || rows * block->head_dim > kLargest) return LBLLM_BAD_SIZE;
    if (!rows) return LBLLM_OK;
    if (!in || !out || !cosine || !sine) return LBLLM_BAD_SIZE;
    if (const int32_t wrong = check(cache, block, rows, 1)) return wrong;
    current()->block_step(block, cache, in, out, cosine, sine, dtype, rows, threads);
    return LBLLM_OK;
}

LBLLM_EXPORT int32_t lbllm_run(const lbllm_model* model, const lbllm_cache* caches, const int32_t* tokens, int64_t count,
                               float* logits, int32_t threads) {
    if (const int32_t wrong = check(model)) return wrong;
    if (!caches || !tokens || count < 1 || count > kLargest || threads < 1) return LBLLM_BAD_SIZE;
    for (int i = 0; i < model->count; i++) {
        if (const int32_t wrong = check(caches + i, model->blocks + i, 1, count)) return wrong;
        if (caches[i].tokens != caches[0].tokens || caches[i].mask) return LBLLM_BAD_CACHE;
    }
    for (int64_t m = 0; m < count; m++)
        if (tokens[m] < 0 || tokens[m] >= model->vocab) return LBLLM_BAD_TOKEN;
    current()->run(model, caches, tokens, count, logits, threads);
    return LBLLM_OK;
}

LBLLM_EXPORT int32_t lbllm_head(const lbllm_rows* weight, const void* x, void* y, int32_t in_features, int64_t out_features,
                                int32_t dtype, int64_t rows, int32_t threads) {
    if (!known(dtype) || (rows && !good(weight))) return LBLLM_BAD_TYPE;
    if (rows < 0 || in_features < 1 || out_features < 1 || threads < 1 || rows * in_features > kLargest) return LBLLM_BAD_SIZE;
    if (rows && (!x || !y)) return LBLLM_BAD_SIZE;
    if (rows) current()->head(weight, x, y, in_features, out_features, dtype, rows, threads);
    return LBLLM_OK;
}

LBLLM_EXPORT uint64_t lbllm_read(const uint8_t* data, int64_t bytes, int32_t threads) {
    return current()->read(data, bytes, threads);
}
