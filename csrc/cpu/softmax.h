// The gates of LoRAMoE's experts (arXiv 2312.09979): a softmax over a few logits, or over the top_k largest of them.
#pragma once

#include "common/limits.h"
#include "cpu/lanes.h"

namespace gci::GCI_ISA {

inline double exponential(double x) { return exp(x); }

// exp(x) for x <= 0 to about 1 ulp: 2^k * p(r), r = x - k ln 2 in [-ln2/2, ln2/2]. Branch-free, so that loops
// vectorise.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  float k = __builtin_rintf(x * 1.44269504f);
  float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
  float p = 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  int32_t bits = (int32_t(k) + 127) << 23;
  float power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return p * power;
}

// Whether a comes before b, largest first; NaN comes before every number, so that top_k cannot drop it.
template <typename Acc>
inline bool precedes(Acc a, Acc b) {
  return a > b || (a != a && b == b);
}

// keep[n] = whether logits[n] is among the k largest; equal logits: the lower index first.
template <typename Acc>
inline void choose(const Acc* logits, bool* keep, int experts, int k) {
  for (int n = 0; n < experts; ++n) keep[n] = false;
  for (int round = 0; round < k; ++round) {
    int best = -1;
    for (int n = 0; n < experts; ++n)
      if (!keep[n] && (best < 0 || precedes(logits[n], logits[best]))) best = n;
    keep[best] = true;
  }
}

template <typename H, typename Acc>
inline void softmax(const H* logits, Acc* gates, int experts, int top_k) {
  for (int n = 0; n < experts; ++n) gates[n] = widen(logits[n]);
  bool keep[max_experts];
  if (top_k < experts) choose(gates, keep, experts, top_k);
  Acc largest = gates[0], total = 0;
  for (int n = 1; n < experts; ++n) largest = gates[n] > largest ? gates[n] : largest;
  // A comparison with NaN is false: a NaN logit reaches the result by the subtraction, not by the maximum.
  for (int n = 0; n < experts; ++n) gates[n] = exponential(Acc(gates[n] - largest));
  if (top_k < experts)
    for (int n = 0; n < experts; ++n) gates[n] = keep[n] ? gates[n] : Acc(0);
  for (int n = 0; n < experts; ++n) total += gates[n];
  Acc inverse = Acc(1) / total;
  for (int n = 0; n < experts; ++n) gates[n] *= inverse;
}

// The same for `tokens` tokens, at most one a lane: gates [tokens, experts] from logits whose rows are ld apart. With
// top_k it goes token by token. Not inlined: one copy for all callers compiles faster.
template <typename H, typename Acc>
__attribute__((noinline)) void softmax_rows(const H* logits, int64_t ld, Acc* gates, int64_t tokens, int experts,
                                            int top_k) {
  if (top_k < experts) {
    for (int64_t t = 0; t < tokens; ++t) softmax<H, Acc>(logits + t * ld, gates + t * experts, experts, top_k);
    return;
  }
  typedef Vector<Acc> V;
  constexpr int count = Lanes<Acc>::count;
  alignas(64) Acc transposed[max_experts * count];
  for (int n = 0; n < experts; ++n)
    for (int t = 0; t < count; ++t) transposed[n * count + t] = t < tokens ? Acc(widen(logits[t * ld + n])) : Acc(0);
  V largest = fetch(transposed), total = {};
  for (int n = 1; n < experts; ++n) largest = larger<Acc>(fetch(transposed + n * count), largest);
  for (int n = 0; n < experts; ++n) {
    const V power = exponential(V(fetch(transposed + n * count) - largest));
    total += power;
    put(transposed + n * count, power);
  }
  const V inverse = Acc(1) / total;
  for (int n = 0; n < experts; ++n) put(transposed + n * count, V(fetch(transposed + n * count) * inverse));
  for (int64_t t = 0; t < tokens; ++t)
    for (int n = 0; n < experts; ++n) gates[t * experts + n] = transposed[n * count + t];
}

}  // namespace gci::GCI_ISA
