// In the place of dispatch.cpp: the ABI with one tier, EMULATED, which runs on any processor with AVX2.
#include <string.h>

#include "tier.h"

static const lbllm::Tier& tier = lbllm::EMULATED;

int32_t lbllm_abi(void) { return 5; }
const char* lbllm_tier(void) { return tier.name; }

int32_t lbllm_choose_tier(const char* name) {
    const bool runs = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    return runs && strcmp(name, tier.name) == 0 ? 0 : -1;
}

int32_t lbllm_quantize(const lbllm_quantizer* quantizer, const void* x, int32_t dtype, int64_t rows, int32_t width, uint8_t* places,
                    float* values, float* steps, int32_t* zeros, int32_t* tables, int32_t step_dtype, int32_t threads) {
    tier.quantize(quantizer, x, dtype, rows, width, places, values, steps, zeros, tables, step_dtype, threads);
    return LBLLM_OK;
}

int32_t lbllm_quantize_backward(const lbllm_quantizer* quantizer, const void* x, int32_t dtype, int64_t groups, const float* values,
                             const float* steps, const int32_t* zeros, const int32_t* tables, const float* gradient,
                             float* inputs, float* sums, int32_t threads) {
    tier.quantize_backward(quantizer, x, dtype, groups, values, steps, zeros, tables, gradient, inputs, sums, threads);
    return LBLLM_OK;
}

int32_t lbllm_linear(const lbllm_weights* weights, const lbllm_quantizer* quantizer, const void* x, void* y, int32_t dtype,
                  int64_t rows, int32_t threads) {
    tier.linear(weights, quantizer, x, y, dtype, rows, threads);
    return LBLLM_OK;
}

int32_t lbllm_block_step(const lbllm_block* block, const lbllm_cache* cache, const void* in, void* out, const void* cosine,
                      const void* sine, int32_t dtype, int64_t rows, int32_t threads) {
    tier.block_step(block, cache, in, out, cosine, sine, dtype, rows, threads);
    return LBLLM_OK;
}

int32_t lbllm_run(const lbllm_model* model, const lbllm_cache* caches, const int32_t* tokens, int64_t count, float* logits,
                  int32_t threads) {
    tier.run(model, caches, tokens, count, logits, threads);
    return LBLLM_OK;
}

int32_t lbllm_head(const lbllm_rows* weight, const void* x, void* y, int32_t in_features, int64_t out_features, int32_t dtype,
                   int64_t rows, int32_t threads) {
    tier.head(weight, x, y, in_features, out_features, dtype, rows, threads);
    return LBLLM_OK;
}

uint64_t lbllm_read(const uint8_t* data, int64_t bytes, int32_t threads) { return tier.read(data, bytes, threads); }
