// A vector of floats as wide as the instruction set's registers, and conversions from and to 16-bit formats.
//
// Kernel sources are compiled once per instruction set, each time into the namespace GCI_ISA. They use builtins and
// libm only: an inline function of the standard library would be compiled for every instruction set under the same
// name, and the linker would keep an arbitrary one of them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "common/kernels.h"

#ifndef GCI_ISA
#define GCI_ISA baseline
#endif

namespace gci::GCI_ISA {

#if defined(__AVX512F__)
constexpr int lanes = 16, tile_rows = 8;
#elif defined(__AVX2__)
constexpr int lanes = 8, tile_rows = 4;
#else
constexpr int lanes = 4, tile_rows = 4;
#endif
constexpr int tile_vectors = 3;  // tile_rows * tile_vectors accumulators and tile_vectors operands fit in the registers

typedef float Vec __attribute__((vector_size(lanes * sizeof(float))));

inline Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }

inline Vec load_part(const float* p, int64_t count) {
  Vec v = {};
  for (int64_t i = 0; i < count && i < lanes; ++i) v[i] = p[i];
  return v;
}
inline void store_part(float* p, Vec v, int64_t count) {
  for (int64_t i = 0; i < count && i < lanes; ++i) p[i] = v[i];
}

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

inline float widen(float v) { return v; }
inline double widen(double v) { return v; }
inline float widen(bfloat16 v) {
  uint32_t bits = uint32_t(v.bits) << 16;
  float result;
  __builtin_memcpy(&result, &bits, sizeof result);
  return result;
}

template <typename T, typename Acc>
inline T narrow(Acc v) {
  return T(v);
}
template <>
inline bfloat16 narrow<bfloat16, float>(float v) {
  uint32_t bits;
  __builtin_memcpy(&bits, &v, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  return {uint16_t(v != v ? 0x7fc0 : rounded)};
}

inline float widen(float16 v) {
  // The bits as a float are 2^112 times too small, subnormals too; the largest exponent means infinity and NaN.
  const uint32_t magnitude = uint32_t(v.bits & 0x7fff) << 13, sign = uint32_t(v.bits & 0x8000) << 16;
  float value;
  __builtin_memcpy(&value, &magnitude, sizeof value);
  value *= 0x1p112f;
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  bits = ((v.bits & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000 : bits) | sign;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

template <>
inline float16 narrow<float16, float>(float v) {
  uint32_t bits;
  __builtin_memcpy(&bits, &v, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // from 65520 on
  if (magnitude < 0x38800000) return {uint16_t(sign | uint32_t(__builtin_rintf(__builtin_fabsf(v) * 0x1p24f)))};
  return {uint16_t(sign | (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13)};
}

// Loads `lanes` values and converts them to float.
inline Vec load_wide(const float* p) { return load(p); }
inline Vec load_wide(const bfloat16* p) {
  typedef uint16_t Halves __attribute__((vector_size(lanes * sizeof(uint16_t))));
  typedef uint32_t Bits __attribute__((vector_size(lanes * sizeof(uint32_t))));
  Halves h;
  __builtin_memcpy(&h, p, sizeof h);
  return Vec(__builtin_convertvector(h, Bits) << 16);
}
inline Vec load_wide(const float16* p) {
#if defined(__AVX512F__)
  return Vec(_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)));
#elif defined(__F16C__)
  return Vec(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)));
#else
  Vec v;
  for (int i = 0; i < lanes; ++i) v[i] = widen(p[i]);
  return v;
#endif
}

// Rounds `lanes` values and stores them.
inline void store_narrow(float* p, Vec v) { store(p, v); }
inline void store_narrow(bfloat16* p, Vec v) {
  typedef uint16_t Halves __attribute__((vector_size(lanes * sizeof(uint16_t))));
  typedef uint32_t Bits __attribute__((vector_size(lanes * sizeof(uint32_t))));
  const Bits bits = Bits(v), nan = Bits(v != v);
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Halves h = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), Halves);
  __builtin_memcpy(p, &h, sizeof h);
}
inline void store_narrow(float16* p, Vec v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(__m512(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(__m256(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < lanes; ++i) p[i] = narrow<float16>(v[i]);
#endif
}

template <typename X>
inline void widen_row(const X* x, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) store(out + i, load_wide(x + i));
  for (; i < n; ++i) out[i] = widen(x[i]);
}
template <typename X>
inline void narrow_row(const float* x, int64_t n, X* out) {
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) store_narrow(out + i, load(x + i));
  for (; i < n; ++i) out[i] = narrow<X>(x[i]);
}

// The type of sums over values of type T.
template <typename T>
struct Accumulator {
  typedef float type;
};
template <>
struct Accumulator<double> {
  typedef double type;
};

}  // namespace gci::GCI_ISA
