// The parts of the table in kernels.cpp: one constant for each file of an instruction set, and the
// tests for the sets. The tests are defined in kernels.cpp, because they must run on every CPU.
#pragma once

#include "cpu_kernels/kernels.h"

namespace moeinf {

extern const KernelSet kPortableKernels;
#if defined(__x86_64__)
[[nodiscard]] bool cpu_has_avx2();
[[nodiscard]] bool cpu_has_avx512();
[[nodiscard]] bool cpu_has_avx512bf16();
[[nodiscard]] bool cpu_has_amx();
extern const KernelSet kAvx2Kernels;
extern const KernelSet kAvx512Kernels;
extern const KernelSet kAvx512Bf16Kernels;
extern const KernelSet kAmxKernels;
// See FormatKernels::tiles.
void amx_arrange(const void* const* rows, int64_t count, int64_t depth, void* to);
void amx_bf16(const DotJob& job);
void amx_e4m3(const DotJob& job);
void amx_e2m1(const DotJob& job);
void amx_int8(const DotJob& job);
void amx_int4(const DotJob& job);
void amx_q8_0(const DotJob& job);
void amx_q4_0(const DotJob& job);
void amx_q4_1(const DotJob& job);
void amx_q5_0(const DotJob& job);
void amx_q5_1(const DotJob& job);
void amx_iq4_nl(const DotJob& job);
void amx_mxfp4(const DotJob& job);
void amx_iq4_xs(const DotJob& job);
void amx_q3_k(const DotJob& job);
void amx_q4_k(const DotJob& job);
void amx_q5_k(const DotJob& job);
void amx_q6_k(const DotJob& job);
#endif

}  // namespace moeinf
