// Vectors of floats or of doubles, both as wide as a register, and e^x of them.
#pragma once

#include <math.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "cpu/vector.h"

namespace gci::GCI_ISA {

template <typename A>
struct Lanes {
  static constexpr int count = lanes * sizeof(float) / sizeof(A);
  typedef A type __attribute__((vector_size(lanes * sizeof(float))));
};
template <typename A>
using Vector = typename Lanes<A>::type;

template <typename A>
inline Vector<A> fetch(const A* p) {
  Vector<A> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <typename A>
inline void put(A* p, Vector<A> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// The larger of each lane; b where a is NaN.
template <typename A>
inline Vector<A> larger(Vector<A> a, Vector<A> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == sizeof(float)) return Vector<A>(_mm512_maskz_max_ps(0xffff, __m512(a), __m512(b)));
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == sizeof(float)) return __builtin_ia32_maxps256(a, b);  // not a comparison and a blend
#endif
  return a > b ? a : b;
}

// e^x for x <= 0 to about 1 ulp, 0 for -inf, NaN for NaN: 2^k * p(r), r = x - k ln 2 in [-ln2/2, ln2/2].
inline Vector<float> exponential(Vector<float> x) {
#if defined(__AVX512F__)
  constexpr __mmask16 all = 0xffff;                // the unmasked intrinsics make GCC 12 warn of its own header
  x = larger<float>(Vector<float>{} - 110.0f, x);  // comes out as 0
  const __m512 scaled = __m512(x * 1.44269504f);
  const Vector<float> k =
      Vector<float>(_mm512_maskz_roundscale_ps(all, scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  // Adding this rounds to an integer, leaves its exponent bits in the low end of the sum, and is undone exactly.
  const Vector<float> shift = Vector<float>{} + 12583039.0f;  // 1.5 * 2^23 + 127
  x = larger<float>(Vector<float>{} - 88.0f, x);              // k = -127, which comes out as 0
  const Vector<float> shifted = x * 1.44269504f + shift, k = shifted - shift;
#endif
  const Vector<float> r = (x - k * 0.693359375f) + k * 2.12194440e-4f;  // the first product is exact
  Vector<float> p = r * 0.008290315f + 0.04189793f;
  p = p * r + 0.16667636f;
  p = p * r + 0.4999915f;
  p = p * r + 0.9999997f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return Vector<float>(_mm512_maskz_scalef_ps(all, __m512(p), __m512(k)));
#else
  typedef int32_t Bits __attribute__((vector_size(sizeof(Vector<float>))));
  return p * Vector<float>(Bits(shifted) << 23);  // a product, so that NaN stays NaN
#endif
}

inline Vector<double> exponential(Vector<double> x) {
  for (int i = 0; i < Lanes<double>::count; ++i) x[i] = exp(x[i]);
  return x;
}

}  // namespace gci::GCI_ISA
