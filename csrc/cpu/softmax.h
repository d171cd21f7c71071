// The gates of LoRAMoE's experts (arXiv 2312.09979): a softmax over a few logits, of which top_k may leave some out.
#pragma once

#include <math.h>

#include "cpu/isa.h"

namespace gci::GCI_ISA {

constexpr int max_experts = 256;

inline double exponential(double x) { return exp(x); }

// exp(x) for x <= 0 to about 1 ulp: 2^k * p(r), r = x - k ln 2 in [-ln2/2, ln2/2]. Branch-free, so that loops vectorise.
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

// Whether a sorts before b, largest first; NaN before every number, so that top_k cannot drop it.
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
  // A comparison with NaN is false, so a NaN logit is carried by the subtraction, not by the maximum.
  for (int n = 0; n < experts; ++n) gates[n] = exponential(Acc(gates[n] - largest));
  if (top_k < experts)
    for (int n = 0; n < experts; ++n) gates[n] = keep[n] ? gates[n] : Acc(0);
  for (int n = 0; n < experts; ++n) total += gates[n];
  Acc inverse = Acc(1) / total;
  for (int n = 0; n < experts; ++n) gates[n] *= inverse;
}

}  // namespace gci::GCI_ISA
