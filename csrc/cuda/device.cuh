// Device functions that the kernels share: vector loads and sums over lanes.
#pragma once

#include <cstdint>

#include "cuda/instructions.cuh"

namespace gci {

// N neighbouring values, aligned to their size (at most 16 bytes), so that they are loaded with few instructions.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T v[N];
};

template <int N, typename T>
__device__ inline Pack<T, N> load(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}

// row[c] to row[c + 3], zeros from `width` on; one load where `vector`: row + c is aligned to its size and width is a
// multiple of 4.
template <typename T>
__device__ inline Pack<T, 4> load4(const T* row, int c, int width, bool vector) {
  Pack<T, 4> result = {};
  if (vector) {
    if (c < width) result = load<4>(row + c);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (c + j < width) result.v[j] = row[c + j];
  }
  return result;
}

constexpr unsigned all_lanes = 0xffffffffu;

__device__ inline int lane_id() { return threadIdx.x % 32; }
__device__ inline int warp_id() { return threadIdx.x / 32; }

// Over groups of `Lanes` neighbouring lanes; the same order of summation in every run.
template <int Lanes>
__device__ inline float sum_lanes(float v) {
#pragma unroll
  for (int offset = Lanes / 2; offset; offset /= 2) v += __shfl_xor_sync(all_lanes, v, offset);
  return v;
}

// N sums over groups of `Lanes` lanes at once. In each step a lane sends half of its values to its partner, so that 16
// sums over 32 lanes take 16 exchanges instead of 80. Afterwards v[0], v[1], ... of a lane are the sums from first_sum
// on.
template <int N, int Lanes>
__device__ inline void scatter_sums(float (&v)[N]) {
  int held = N;
#pragma unroll
  for (int offset = Lanes / 2; offset; offset /= 2) {
    if (held == 1) {
      v[0] += __shfl_xor_sync(all_lanes, v[0], offset);
      continue;
    }
    held /= 2;
    const bool upper = threadIdx.x & offset;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      if (i >= held) break;
      const float mine = upper ? v[i + held] : v[i], sent = upper ? v[i] : v[i + held];
      v[i] = mine + __shfl_xor_sync(all_lanes, sent, offset);
    }
  }
}
template <int N, int Lanes>
__device__ inline int first_sum() {
  int held = N, first = 0;
#pragma unroll
  for (int offset = Lanes / 2; offset; offset /= 2)
    if (held > 1) {
      held /= 2;
      if (threadIdx.x & offset) first += held;
    }
  return first;
}
// Whether a lane is the first of those that hold the same sums.
template <int N, int Lanes>
__device__ inline bool first_holder() {
  return threadIdx.x % (Lanes > N ? Lanes / N : 1) == 0;
}

}  // namespace gci
