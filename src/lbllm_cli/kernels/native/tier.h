// One instruction set's kernels. Every tier compiles the same kernels with its own flags and its own dot products (dots_*.inl).
#pragma once
#include "lbllm_kernels.h"

namespace lbllm {

struct Tier {
    const char* name;
    decltype(&lbllm_quantize) quantize;
    decltype(&lbllm_quantize_backward) quantize_backward;
    decltype(&lbllm_linear) linear;
    decltype(&lbllm_block_step) block_step;
    decltype(&lbllm_head) head;
    decltype(&lbllm_read) read;
};

extern const Tier tier_portable;
extern const Tier tier_avx2;
extern const Tier tier_avxvnni;
extern const Tier tier_avx512;

}  // namespace lbllm
