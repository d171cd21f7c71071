// Dot products of the rows of a matrix with a few vectors, for decoding steps: every row is read once.
#pragma once

#include "cpu/vector.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace gci::GCI_ISA {

typedef int32_t Index __attribute__((vector_size(sizeof(Vec))));

// Element i is element index[i] of a followed by b.
inline Vec shuffle(Vec a, Vec b, Index index) {
#if defined(__clang__)
  float all[2 * lanes];
  store(all, a), store(all + lanes, b);
  Vec chosen;
  for (int i = 0; i < lanes; ++i) chosen[i] = all[index[i]];
  return chosen;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// Sums of neighbouring elements: those of a, then those of b.
inline Vec add_pairs(Vec a, Vec b) {
  Index even;
  for (int i = 0; i < lanes; ++i) even[i] = 2 * i;
  return shuffle(a, b, even) + shuffle(a, b, even + 1);
}

// Element i becomes the total of v[i].
inline Vec totals(Vec (&v)[lanes]) {
#pragma GCC unroll 4
  for (int count = lanes; count > 1; count /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < count / 2; ++i) v[i] = add_pairs(v[2 * i], v[2 * i + 1]);
  return v[0];
}

// How a row of W and a vector of X are multiplied: `size` elements at a time, converted to float, or as pairs by the
// processor's own bfloat16 product.
template <typename X, typename W>
struct Unit {
  static constexpr int size = lanes;
  template <typename T>
  static Vec read(const T* p) {
    return load_wide(p);
  }
  static Vec add(Vec sum, Vec w, Vec x) { return sum + w * x; }
};
#if defined(__AVX512BF16__)
template <>
struct Unit<bfloat16, bfloat16> {
  static constexpr int size = 2 * lanes;
  static __m512bh read(const bfloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static Vec add(Vec sum, __m512bh w, __m512bh x) { return Vec(_mm512_dpbf16_ps(__m512(sum), w, x)); }
};
#else
// A bfloat16 is the upper half of a float: a shift and a mask make two floats of two neighbours in a 32-bit word. Both
// operands are split in the same way, so that the order of the elements does not matter.
template <>
struct Unit<bfloat16, bfloat16> {
  static constexpr int size = 2 * lanes;
  struct Halves {
    Vec low, high;
  };
  static Halves read(const bfloat16* p) {
    typedef uint32_t Words __attribute__((vector_size(sizeof(Vec))));
    Words words;
    __builtin_memcpy(&words, p, sizeof words);
    return {Vec(words << 16), Vec(words & 0xffff0000u)};
  }
  // The dependency chain of sums has one addition a step.
  static Vec add(Vec sum, Halves w, Halves x) { return sum + (w.low * x.low + w.high * x.high); }
};
#endif

template <typename X, typename W>
inline Vec multiply_rest(const W* row, const X* x, int64_t n) {
  Vec sum = {};
  for (int64_t j = 0; j < n; ++j) sum[j % lanes] += widen(row[j]) * widen(x[j]);
  return sum;
}

// sums[t][first + r] = the lanes of rows[r] . x[t].
template <int R, int T, typename X, typename W>
inline void multiply(const W* rows, int64_t n, const X* const* x, Vec (&sums)[T][lanes], int first) {
  typedef Unit<X, W> U;
  Vec sum[R][T] = {};
  int64_t k = 0;
  for (; k + U::size <= n; k += U::size) {
    decltype(U::read(x[0])) values[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) values[t] = U::read(x[t] + k);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const auto row = U::read(rows + r * n + k);
      // With several vectors the processor does not reach the next loads early enough by itself. A prefetch behind the
      // last row does not fault.
      if (R > 1) __builtin_prefetch(rows + (r + R) * n + k);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) sum[r][t] = U::add(sum[r][t], row, values[t]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      if (k < n) sum[r][t] += multiply_rest(rows + r * n + k, x[t] + k, n - k);
      sums[t][first + r] = sum[r][t];
    }
}

// out[t * ld + r] = rows[r] . x[t] for `count` <= lanes rows and T vectors.
template <int T, typename X, typename W>
inline void multiply_rows(const W* rows, int64_t n, int count, const X* const* x, float* out, int64_t ld) {
  // One vector is bound by memory, and a single row at a time is read fastest. With more, rows share the loaded
  // vectors.
  constexpr int R = T < 4 ? 1 : lanes / 4;
  Vec sums[T][lanes];
  int r = 0;
  for (; r + R <= count; r += R) multiply<R, T>(rows + r * n, n, x, sums, r);
  for (; r < count; ++r) multiply<1, T>(rows + r * n, n, x, sums, r);
  for (; r < lanes; ++r)  // unused rows: summed with the others, and not stored
    for (int t = 0; t < T; ++t) sums[t][r] = Vec{};
  for (int t = 0; t < T; ++t) store_part(out + t * ld, totals(sums[t]), count);
}

// out[t * ld + r] = rows[r] . x[t] for `count` rows and `tokens` vectors.
template <typename X, typename W>
inline void multiply_all(const W* rows, int64_t n, int64_t count, const X* const* x, int tokens, float* out,
                         int64_t ld) {
  for (int64_t r = 0; r < count; r += lanes) {
    const int some = int(min_of(lanes, count - r));
    int t = 0;
    if (lanes == 16)  // else the sums do not fit in the registers
      for (; t + 8 <= tokens; t += 8) multiply_rows<8>(rows + r * n, n, some, x + t, out + t * ld + r, ld);
    for (; t + 4 <= tokens; t += 4) multiply_rows<4>(rows + r * n, n, some, x + t, out + t * ld + r, ld);
    for (; t + 2 <= tokens; t += 2) multiply_rows<2>(rows + r * n, n, some, x + t, out + t * ld + r, ld);
    for (; t < tokens; ++t) multiply_rows<1>(rows + r * n, n, some, x + t, out + t * ld + r, ld);
  }
}

}  // namespace gci::GCI_ISA
