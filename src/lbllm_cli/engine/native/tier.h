// One instruction set's kernels. Every tier compiles the same kernels with its own flags and its own dot products (dots_*.inl).
#pragma once
#include "lbllm_kernels.h"

namespace lbllm {

// A tier's function of an entry: dispatch.cpp has checked what it is given.
template <class Entry>
struct Checked;
template <class... Arguments>
struct Checked<int32_t (*)(Arguments...)> {
    using type = void (*)(Arguments...);
};

struct Tier {
    const char* name;
    Checked<decltype(&lbllm_quantize)>::type quantize;
    Checked<decltype(&lbllm_quantize_backward)>::type quantize_backward;
    Checked<decltype(&lbllm_linear)>::type linear;
    Checked<decltype(&lbllm_block_step)>::type block_step;
    Checked<decltype(&lbllm_run)>::type run;
    Checked<decltype(&lbllm_head)>::type head;
    decltype(&lbllm_read) read;
};

extern const Tier tier_portable;
extern const Tier tier_avx2;
extern const Tier tier_avxvnni;
extern const Tier tier_avx512;

}  // namespace lbllm
