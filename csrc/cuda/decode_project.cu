// The first half of a decoding step: a few rows of x times all rows of A and router. A warp has one column, a block has
// eight; `in` is split so that all multiprocessors read the adapter at the same time.
#include "cuda/dispatch.h"

namespace gci {
namespace {

constexpr int threads = 256, block_columns = threads / 32;

template <int V, typename X, typename W, int T>
__device__ inline void accumulate(const W* w, const X* const (&x)[T], int64_t begin, int64_t end, float (&sums)[T]) {
#pragma unroll(V > 1 && T == 1 ? 2 : 1)
  for (int64_t k = begin + lane_id() * V; k < end; k += 32 * V) {
    const Pack<W, V> weights = load<V>(w + k);
    Pack<X, V> values[T];  // all loads come before the first use, so that their latencies overlap
#pragma unroll
    for (int t = 0; t < T; ++t) values[t] = load<V>(x[t] + k);
#pragma unroll
    for (int t = 0; t < T; ++t)
#pragma unroll
      for (int i = 0; i < V; ++i) sums[t] += widen(weights.v[i]) * widen(values[t].v[i]);
  }
}

// grid: splits, blocks of columns, groups.
template <typename X, typename W, int T>
__global__ void __launch_bounds__(threads, T > 4 ? 1 : 2)
    decode_project_kernel(const __grid_constant__ DecodeArgs a, float* partial, int64_t slice, int columns,
                          bool vector) {
  let_next_start();
  const DecodeGroup& g = a.groups[blockIdx.z];
  const int width = g.rank * max(g.experts, 1), column = blockIdx.y * block_columns + warp_id();
  if (column >= width + g.experts) return;  // a whole warp, and no barrier follows

  const W* w = column < width ? static_cast<const W*>(g.A) + column * a.in
                              : static_cast<const W*>(g.router) + (column - width) * a.in;
  const X* x[T];
#pragma unroll
  for (int t = 0; t < T; ++t)  // behind the last token that token again: no branches, and no further reads
    x[t] = static_cast<const X*>(a.x) + a.rows[g.first + min(t, g.count - 1)] * a.ld_x;
  const int64_t begin = blockIdx.x * slice, end = min(begin + slice, a.in);
  float sums[T] = {};
  if (vector)
    accumulate<16 / sizeof(X)>(w, x, begin, end, sums);
  else
    accumulate<1>(w, x, begin, end, sums);

  scatter_sums<T, 32>(sums);
  const int t = first_sum<T, 32>();
  if (first_holder<T, 32>() && t < g.count)
    partial[(int64_t(blockIdx.x) * a.tokens + g.first + t) * columns + column] = sums[0];
}

// Whether all 16-byte loads are aligned.
bool reads_vectors(const DecodeArgs& a) {
  const int64_t unit = a.dtype == DType::float32 ? 4 : 8;
  bool result = a.in % unit == 0 && a.ld_x % unit == 0 && aligned(a.x, 16);
  for (int i = 0; i < a.num_groups; ++i) result &= aligned(a.groups[i].A, 16) && aligned(a.groups[i].router, 16);
  return result;
}

}  // namespace

int decode_project(const DecodeArgs& a, float* partial, int splits, int columns, void* stream) {
  if (check_decode_project(a, partial, splits, columns)) return invalid_argument;
  const int64_t units = (a.in + decode_slice_unit - 1) / decode_slice_unit;
  const int64_t slice = (units + splits - 1) / splits * decode_slice_unit;
  const LaunchShape shape = {unsigned(splits),
                             unsigned((columns + block_columns - 1) / block_columns),
                             unsigned(a.num_groups),
                             threads,
                             0,
                             false};
  return with_dtypes(a.dtype, a.adapter_dtype, [&](auto x, auto w) {
    return with_tokens(a, [&](auto tokens) {
      return launch(decode_project_kernel<decltype(x), decltype(w), decltype(tokens)::value>, shape, stream, a, partial,
                    slice, columns, reads_vectors(a));
    });
  });
}

}  // namespace gci
