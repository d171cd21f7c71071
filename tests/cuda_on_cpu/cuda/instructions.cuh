// In place of csrc/cuda/instructions.cuh: CUDA's words for g++, so that the kernels run on a CPU, block after block.
// Each thread of a block is a fiber; at a barrier it waits until the others of its warp or block are there.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __shared__ static  // blocks run one after another
#define __grid_constant__
#define __launch_bounds__(...)

struct Index {
  unsigned x, y, z;
};
extern Index threadIdx, blockIdx;
using std::max;
using std::min;

void __syncthreads();
void __syncwarp();
float __shfl_xor_sync(unsigned lanes, float value, int offset);
inline int __clz(int n) { return n ? __builtin_clz(unsigned(n)) : 32; }
inline float rsqrtf(float v) { return 1 / std::sqrt(v); }

namespace gci {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

inline float widen(float v) { return v; }
inline float widen(bfloat16 v) {
  const uint32_t bits = uint32_t(v.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}
float widen(float16 v);

template <typename T>
T narrow(float v);
template <>
inline float narrow<float>(float v) {
  return v;
}
template <>
bfloat16 narrow<bfloat16>(float v);
template <>
float16 narrow<float16>(float v);

void let_next_start();
void wait_for_previous();
inline void prefetch_to_l2(const void*) {}
float* dynamic_shared();

}  // namespace gci
