// AVX2, FMA and F16C.
#include "vectors.inl"
#include "dots_avx2.inl"
#include "quantize.inl"
#include "linear.inl"
#include "head.inl"
#include "step.inl"

namespace lbllm {
extern const Tier tier_avx2{"avx2", quantize, quantize_backward, linear, block_step, head, read};
}  // namespace lbllm
