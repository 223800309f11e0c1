// Any processor.
#include "vectors.inl"
#include "dots_portable.inl"
#include "quantize.inl"
#include "linear.inl"
#include "head.inl"
#include "step.inl"

namespace lbllm {
extern const Tier tier_portable{"portable", quantize, quantize_backward, linear, block_step, head, read};
}  // namespace lbllm
