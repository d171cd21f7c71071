// LoRAMoE's gate (arXiv 2312.09979): softmax over the experts and the product with the projected values, one pass over
// tokens x (experts * rank) values, and its backward, which computes the softmax again instead of saving it.
#include "cpu/softmax.h"

namespace gci::GCI_ISA {
namespace {

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
