// Functions that are made of special instructions: 16-bit formats, overlapping launches, dynamic shared memory.
// The formats are defined here because cuda_fp16.h and cuda_bf16.h take longer to compile than the kernels.
#pragma once

#include <cstdint>

namespace gci {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

__device__ inline float widen(float v) { return v; }
__device__ inline float widen(bfloat16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }
__device__ inline float widen(float16 v) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(v.bits));
  return result;
}

template <typename T>
__device__ T narrow(float v);  // to nearest, ties to even
template <>
__device__ inline float narrow<float>(float v) {
  return v;
}
template <>
__device__ inline bfloat16 narrow<bfloat16>(float v) {
  bfloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(v));
  return result;
}
template <>
__device__ inline float16 narrow<float16>(float v) {
  float16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(v));
  return result;
}

// Programmatic dependent launch (from sm_90 on; without effect elsewhere). The first lets the next kernel start; the
// second, in that next kernel, waits until everything that the kernel before it wrote can be read.
__device__ inline void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ inline void prefetch_to_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// The dynamic shared memory, as large as the launch says.
__device__ inline float* dynamic_shared() {
  extern __shared__ float4 memory[];
  return reinterpret_cast<float*>(memory);
}

}  // namespace gci
