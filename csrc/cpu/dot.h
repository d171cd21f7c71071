// Dot products of adapter rows, in whatever dtype they are stored, with float32 vectors.
#pragma once

#include "cpu/isa.h"

namespace gci::GCI_ISA {

template <typename X>
inline void widen_row(const X* x, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) store(out + i, load_wide(x + i));
  for (; i < n; ++i) out[i] = widen(x[i]);
}

inline float total(Vec v) {
  float parts[lanes];
  store(parts, v);
  for (int width = lanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
  return parts[0];
}

// out[t] = a . x[t] for `Tokens` rows of x; several sums at a time, for one would wait for its own last step.
template <int Tokens, typename W>
inline void dot(const W* a, const float* x, int64_t ld_x, int64_t n, float* out) {
  constexpr int chains = Tokens == 1 ? 4 : Tokens == 2 ? 2 : 1;
  Vec sum[Tokens][chains] = {};
  int64_t i = 0;
  for (; i + chains * lanes <= n; i += chains * lanes)
#pragma GCC unroll 4
    for (int c = 0; c < chains; ++c) {
      const Vec v = load_wide(a + i + c * lanes);
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t) sum[t][c] += v * load(x + t * ld_x + i + c * lanes);
    }
  for (; i + lanes <= n; i += lanes)
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) sum[t][0] += load_wide(a + i) * load(x + t * ld_x + i);
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) {
    float rest = 0;
    for (int64_t j = i; j < n; ++j) rest += widen(a[j]) * x[t * ld_x + j];
    for (int c = 1; c < chains; ++c) sum[t][0] += sum[t][c];
    out[t] = total(sum[t][0]) + rest;
  }
}

template <typename W>
inline void dot_all(const W* a, const float* x, int64_t ld_x, int64_t n, int tokens, float* out) {
  int t = 0;
  for (; t + 4 <= tokens; t += 4) dot<4>(a, x + t * ld_x, ld_x, n, out + t);
  for (; t + 2 <= tokens; t += 2) dot<2>(a, x + t * ld_x, ld_x, n, out + t);
  for (; t < tokens; ++t) dot<1>(a, x + t * ld_x, ld_x, n, out + t);
}

}  // namespace gci::GCI_ISA
