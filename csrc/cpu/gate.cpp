// LoRAMoE's gate (arXiv 2312.09979): the softmax over the experts times the projected values, in one pass over
// tokens x (experts * rank) values; and its backward, which recomputes the softmax.
#include "cpu/softmax.h"

namespace gci::GCI_ISA {
namespace {

// H is the dtype of the projected values and of du, U of u and dprojected. `Piece` divides the rank: an expert's values
// are processed in pieces of that many, and the compiler makes a vector of each piece.
template <typename H, typename U, int Piece>
void forward(const GateArgs& a, void* u_out, void* gates_out, int threads) {
  typedef typename Accumulator<U>::type Acc;
  constexpr int step = Lanes<Acc>::count;
  const int experts = a.experts, rank = a.rank;
  const Acc scaling = Acc(a.scaling);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t first = 0; first < a.tokens; first += step) {
    const int64_t count = min_of(step, a.tokens - first);
    const H* h = static_cast<const H*>(a.projected) + first * a.ld_projected;
    U* u = static_cast<U*>(u_out) + first * experts * rank;
    Acc* gates = static_cast<Acc*>(gates_out) + first * experts;
    softmax_rows<H, Acc>(h + experts * rank, a.ld_projected, gates, count, experts, a.top_k);
    for (int64_t t = 0; t < count; ++t, h += a.ld_projected, u += experts * rank, gates += experts)
      for (int n = 0; n < experts; ++n) {
        const Acc factor = scaling * gates[n];
        for (int j = n * rank; j < (n + 1) * rank; j += Piece)
          for (int i = j; i < j + Piece; ++i) u[i] = narrow<U>(factor * widen(h[i]));
      }
  }
}

// One token's dprojected and u; gates and dgates (may be null) are this token's.
// dh = scaling * gate * du;  dgate = dgates + scaling * sum_j du_j h_j;  dlogit = gate * (dgate - sum(gate * dgate)).
// A gate that top_k dropped is 0, so that its logit gets no gradient.
template <typename H, typename U, int Piece, typename Acc>
inline void backward_token(const GateArgs& a, const H* h, const H* du, const Acc* gates, const Acc* dgates, U* u,
                           U* dh) {
  const int experts = a.experts, rank = a.rank;
  const Acc scaling = Acc(a.scaling);
  Acc dgate[max_experts], mean = 0;
  for (int n = 0; n < experts; ++n) {
    const Acc factor = scaling * gates[n];
    Acc sums[Piece] = {}, sum = 0;
    for (int j = n * rank; j < (n + 1) * rank; j += Piece)
      for (int i = 0; i < Piece; ++i) {
        const Acc value = widen(h[j + i]), gradient = widen(du[j + i]);
        sums[i] += gradient * value;
        dh[j + i] = narrow<U>(factor * gradient);
        u[j + i] = narrow<U>(factor * value);
      }
    for (int i = 0; i < Piece; ++i) sum += sums[i];
    dgate[n] = scaling * sum + (dgates ? dgates[n] : Acc(0));
    mean += gates[n] * dgate[n];
  }
  for (int n = 0; n < experts; ++n) dh[experts * rank + n] = narrow<U>(gates[n] * (dgate[n] - mean));
}

template <typename H, typename U, int Piece>
void backward(const GateArgs& a, const void* du_in, const void* dgates_in, void* u_out, void* dprojected_out,
              int threads) {
  typedef typename Accumulator<U>::type Acc;
  constexpr int step = Lanes<Acc>::count;
  const int64_t experts = a.experts, width = experts * a.rank;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t first = 0; first < a.tokens; first += step) {
    const int64_t end = min_of(first + step, a.tokens);
    const H* h = static_cast<const H*>(a.projected) + first * a.ld_projected;
    Acc gates[step * max_experts];
    softmax_rows<H, Acc>(h + width, a.ld_projected, gates, end - first, a.experts, a.top_k);
    for (int64_t t = first; t < end; ++t)
      backward_token<H, U, Piece>(
          a, h + (t - first) * a.ld_projected, static_cast<const H*>(du_in) + t * width, gates + (t - first) * experts,
          dgates_in ? static_cast<const Acc*>(dgates_in) + t * experts : nullptr, static_cast<U*>(u_out) + t * width,
          static_cast<U*>(dprojected_out) + t * (width + experts));
  }
}

// run(h_like, u_like) with a value of each dtype. The projected values and du come in the dtype of the rest, or in
// float32 where that is bfloat16.
template <typename Run>
void for_dtypes(const GateArgs& a, Run run) {
  if (a.dtype == DType::float64) return run(double(), double());
  if (a.dtype == DType::float32) return run(float(), float());
  if (a.projected_dtype == DType::float32) return run(float(), bfloat16());
  run(bfloat16(), bfloat16());
}

void gate_forward(const GateArgs& a, void* u, void* gates, int threads) {
  for_dtypes(a, [&](auto h_like, auto u_like) {
    typedef decltype(h_like) H;
    typedef decltype(u_like) U;
    a.rank % 4 ? forward<H, U, 1>(a, u, gates, threads) : forward<H, U, 4>(a, u, gates, threads);
  });
}

void gate_backward(const GateArgs& a, const void* du, const void* dgates, void* u, void* dprojected, int threads) {
  for_dtypes(a, [&](auto h_like, auto u_like) {
    typedef decltype(h_like) H;
    typedef decltype(u_like) U;
    a.rank % 4 ? backward<H, U, 1>(a, du, dgates, u, dprojected, threads)
               : backward<H, U, 4>(a, du, dgates, u, dprojected, threads);
  });
}

}  // namespace

[[gnu::cold]] void add_gate(Kernels& table) {
  table.gate_forward = gate_forward;
  table.gate_backward = gate_backward;
}

}  // namespace gci::GCI_ISA
