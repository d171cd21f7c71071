// What a kernel source needs to be compiled once per instruction set: its namespace, a vector of floats, number formats.
// Only builtins and libm in here: an inline function of the standard library would be emitted for every instruction set
// under one name, and the linker would keep any of them.
#pragma once

#include <cstdint>
#include <cstring>

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
constexpr int tile_vectors = 3;  // tile_rows * tile_vectors accumulators and tile_vectors operands fit the registers

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

// The type sums are kept in.
template <typename T>
struct Accumulator {
  typedef float type;
};
template <>
struct Accumulator<double> {
  typedef double type;
};

}  // namespace gci::GCI_ISA
