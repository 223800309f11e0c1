// AVX2 with VNNI in its VEX form: client processors since 2021.
#include "vectors.inl"

#define LBLLM_DPBUSD _mm256_dpbusd_avx_epi32

#include "dots_avx2.inl"
#include "lanes.inl"
#include "quantize.inl"
#include "panels.inl"
#include "linear.inl"
#include "head.inl"
#include "records.inl"
#include "attention.inl"
#include "prefill.inl"
#include "block.inl"
#include "model.inl"

namespace lbllm {
extern const Tier tier_avxvnni{"avxvnni", quantize, quantize_backward, linear, block_step, run, head, read};
}  // namespace lbllm
