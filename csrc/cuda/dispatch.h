// Chooses a kernel's template arguments, before its launch.
#pragma once

#include "cuda/decode.h"
#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace gci {

// Calls work(x, adapter) with a value of each of the two types, which are checked already.
template <typename F>
int with_dtypes(DType x, DType adapter, F work) {
  const bool wide = adapter == DType::float32;
  if (x == DType::bfloat16) return wide ? work(bfloat16{}, float{}) : work(bfloat16{}, bfloat16{});
  if (x == DType::float16) return wide ? work(float16{}, float{}) : work(float16{}, float16{});
  return work(float{}, float{});
}

// A kernel's template argument T, the number of tokens that it has registers for: at least the largest group's.
template <int T>
struct Tokens {
  static constexpr int value = T;
};
template <typename F>
int with_tokens(const DecodeArgs& a, F work) {
  int most = 1;
  for (int i = 0; i < a.num_groups; ++i) most = a.groups[i].count > most ? a.groups[i].count : most;
  return most == 1 ? work(Tokens<1>{}) : most <= 4 ? work(Tokens<4>{}) : work(Tokens<max_decode_tokens>{});
}

inline bool aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

}  // namespace gci
