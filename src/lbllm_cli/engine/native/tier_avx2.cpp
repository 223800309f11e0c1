// AVX2, FMA and F16C.
#include "vectors.inl"
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
extern const Tier tier_avx2{"avx2", quantize, quantize_backward, linear, block_step, run, head, read};
}  // namespace lbllm
