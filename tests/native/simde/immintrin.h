// Stands for the compiler's immintrin.h: AVX-512 and AVX-VNNI intrinsics become SIMDe's, in AVX2 and plain C.
#pragma once
#include_next <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

// The VEX form of the same instruction; SIMDe has the EVEX one.
#undef _mm256_dpbusd_avx_epi32
#define _mm256_dpbusd_avx_epi32 simde_mm256_dpbusd_epi32
