// LoRAMoE's gate (arXiv 2312.09979): softmax over the experts and the product with the projected values, one pass over
// tokens x (experts * rank) values, and its backward, which computes the softmax again instead of saving it.
#include <math.h>

#include "cpu/isa.h"

namespace gci::GCI_ISA {
namespace {

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
void choose(const Acc* logits, bool* keep, int experts, int k) {
  for (int n = 0; n < experts; ++n) keep[n] = false;
  for (int round = 0; round < k; ++round) {
    int best = -1;
    for (int n = 0; n < experts; ++n)
      if (!keep[n] && (best < 0 || precedes(logits[n], logits[best]))) best = n;
    keep[best] = true;
  }
}

template <typename H, typename Acc>
void softmax(const H* logits, Acc* gates, int experts, int top_k) {
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

template <typename H, typename U>
void forward(const GateArgs& a, void* u_out, void* gates_out, int threads) {
  typedef typename Accumulator<U>::type Acc;
  const int experts = a.experts, rank = a.rank;
  const Acc scaling = Acc(a.scaling);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t t = 0; t < a.tokens; ++t) {
    const H* h = static_cast<const H*>(a.projected) + t * a.ld_projected;
    U* u = static_cast<U*>(u_out) + t * experts * rank;
    Acc* gates = static_cast<Acc*>(gates_out) + t * experts;
    softmax<H, Acc>(h + experts * rank, gates, experts, a.top_k);
    for (int n = 0; n < experts; ++n)
      for (int j = 0; j < rank; ++j) u[n * rank + j] = narrow<U>(scaling * gates[n] * widen(h[n * rank + j]));
  }
}

// dh = scaling * gate * du;  dgate = dgates + scaling * sum_j du_j h_j;  dlogit = gate * (dgate - sum(gate * dgate)).
// A gate that top_k left out is 0, so the same line gives its logit no gradient.
template <typename H, typename U>
void backward(const GateArgs& a, const void* du_in, const void* dgates_in, void* u_out, void* dprojected_out,
              int threads) {
  typedef typename Accumulator<U>::type Acc;
  const int experts = a.experts, rank = a.rank, width = experts * rank;
  const Acc scaling = Acc(a.scaling);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t t = 0; t < a.tokens; ++t) {
    const H* h = static_cast<const H*>(a.projected) + t * a.ld_projected;
    const H* du = static_cast<const H*>(du_in) + t * width;
    const Acc* dgates = dgates_in ? static_cast<const Acc*>(dgates_in) + t * experts : nullptr;
    U* u = static_cast<U*>(u_out) + t * width;
    U* dh = static_cast<U*>(dprojected_out) + t * (width + experts);
    Acc gates[max_experts], dgate[max_experts], mean = 0;
    softmax<H, Acc>(h + width, gates, experts, a.top_k);
    for (int n = 0; n < experts; ++n) {
      Acc sum = 0, factor = scaling * gates[n];
      for (int j = n * rank; j < (n + 1) * rank; ++j) {
        sum += Acc(widen(du[j])) * Acc(widen(h[j]));
        dh[j] = narrow<U>(factor * widen(du[j]));
        u[j] = narrow<U>(factor * widen(h[j]));
      }
      dgate[n] = scaling * sum + (dgates ? dgates[n] : Acc(0));
      mean += gates[n] * dgate[n];
    }
    for (int n = 0; n < experts; ++n) dh[width + n] = narrow<U>(gates[n] * (dgate[n] - mean));
  }
}

}  // namespace

// The projected values and du come in the dtype of the rest, or in float32 where that is bfloat16.
void gate_forward(const GateArgs& a, void* u, void* gates, int threads) {
  if (a.dtype == DType::float64) return forward<double, double>(a, u, gates, threads);
  if (a.dtype == DType::float32) return forward<float, float>(a, u, gates, threads);
  if (a.projected_dtype == DType::float32) return forward<float, bfloat16>(a, u, gates, threads);
  return forward<bfloat16, bfloat16>(a, u, gates, threads);
}

void gate_backward(const GateArgs& a, const void* du, const void* dgates, void* u, void* dprojected, int threads) {
  if (a.dtype == DType::float64) return backward<double, double>(a, du, dgates, u, dprojected, threads);
  if (a.dtype == DType::float32) return backward<float, float>(a, du, dgates, u, dprojected, threads);
  if (a.projected_dtype == DType::float32) return backward<float, bfloat16>(a, du, dgates, u, dprojected, threads);
  return backward<bfloat16, bfloat16>(a, du, dgates, u, dprojected, threads);
}

}  // namespace gci::GCI_ISA
