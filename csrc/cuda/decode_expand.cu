// The second half of a decoding step: adds up the partial sums of the first half, mixes them, multiplies them with B
// and adds the result to y. Every block adds up all sums of its tokens, a few KB in the L2 cache: that is cheaper than
// another launch, and no block waits for another.
#include "cuda/dispatch.h"

namespace gci {
namespace {

constexpr int threads = 256, row_lanes = 4, block_rows = threads / row_lanes;
constexpr int preloads = 4;  // of four values of a row of B each, which a lane loads before the first half is done

// The number of experts before expert n: largest logit first, NaN before every number, equal ones by their index.
__device__ inline int position_of(const float* logits, int experts, int n) {
  const float own = logits[n];
  int before = 0;
  for (int m = 0; m < experts; ++m) {
    const float other = logits[m];
    const bool first = other > own || (other != other && own == own);
    const bool second = own > other || (own != own && other == other);
    before += first || (!second && m < n);
  }
  return before;
}

// One warp's work on one token: h becomes scaling * gate * h, and the logits behind it the numerators of the gates.
__device__ inline void apply_gate(float* h, int width, const DecodeGroup& g) {
  float* logits = h + width;
  float largest = -INFINITY, total = 0;
  unsigned kept = 0;  // bit i: whether this lane's expert number i is among the top_k
  for (int n = lane_id(), i = 0; n < g.experts; n += 32, ++i) {
    largest = fmaxf(largest, logits[n]);  // a NaN logit reaches the result by the subtraction
    if (g.top_k >= g.experts || position_of(logits, g.experts, n) < g.top_k) kept |= 1u << i;
  }
#pragma unroll
  for (int offset = 16; offset; offset /= 2) largest = fmaxf(largest, __shfl_xor_sync(all_lanes, largest, offset));
  __syncwarp();  // every lane has read all logits
  for (int n = lane_id(), i = 0; n < g.experts; n += 32, ++i) {
    logits[n] = kept >> i & 1 ? expf(logits[n] - largest) : 0.0f;
    total += logits[n];
  }
  const float inverse = 1 / sum_lanes<32>(total);
  __syncwarp();
  for (int c = lane_id(); c < width; c += 32) h[c] *= g.scaling * (logits[c / g.rank] * inverse);
}

// sums[t] += four values of a row of B times the same four of u[t].
template <typename W, int T>
__device__ inline void accumulate(const Pack<W, 4>& b, const float* u, int stride, int count, float (&sums)[T]) {
#pragma unroll
  for (int t = 0; t < T; ++t) {
    const Pack<float, 4> values = load<4>(u + min(t, count - 1) * stride);
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[t] += widen(b.v[i]) * values.v[i];
  }
}

// grid: blocks of rows of B, groups. Shared memory: u [tokens of the group, stride], then results [T, block_rows].
template <typename Y, typename W, int T>
__global__ void __launch_bounds__(threads, 2)
    decode_expand_kernel(const __grid_constant__ DecodeArgs a, const float* partial, int splits, int columns,
                         int stride, bool vector) {
  constexpr int outputs = (T * block_rows + threads - 1) / threads;  // of one thread
  float* u = dynamic_shared();
  const DecodeGroup& g = a.groups[blockIdx.y];
  const int width = g.rank * max(g.experts, 1), used = width + g.experts;
  const int64_t first_row = int64_t(blockIdx.x) * block_rows;
  float* results = u + g.count * stride;

  const W* b = static_cast<const W*>(g.B) + min(first_row + threadIdx.x / row_lanes, a.out - 1) * width;
  const int first_column = threadIdx.x % row_lanes * 4;
  Pack<W, 4> preloaded[preloads];
#pragma unroll
  for (int i = 0; i < preloads; ++i) preloaded[i] = load4(b, first_column + i * row_lanes * 4, width, vector);
  wait_for_previous();

  float before[outputs];  // y, loaded now to hide the latency
#pragma unroll
  for (int i = 0; i < outputs; ++i) {
    const int e = threadIdx.x + i * threads, t = e / block_rows;
    const int64_t row = first_row + e % block_rows;
    const bool exists = t < g.count && row < a.out;
    before[i] = exists ? widen(static_cast<const Y*>(a.y)[a.rows[g.first + t] * a.ld_y + row]) : 0.0f;
  }
  for (int e = threadIdx.x; e < g.count * stride; e += threads) {
    const int t = e / stride, c = e % stride;
    const float* source = partial + (g.first + t) * columns + c;
    float sum = 0;
    if (c < used) {
#pragma unroll 8
      for (int s = 0; s < splits; ++s) sum += source[int64_t(s) * a.tokens * columns];
    }
    u[e] = g.experts ? sum : g.scaling * sum;  // 0 behind the last column: the product may read there
  }
  __syncthreads();
  if (g.experts) {
    for (int t = warp_id(); t < g.count; t += threads / 32) apply_gate(u + t * stride, width, g);
    __syncthreads();
  }

  float sums[T] = {};
#pragma unroll
  for (int i = 0; i < preloads; ++i) {
    const int c = first_column + i * row_lanes * 4;
    if (c < width) accumulate(preloaded[i], u + c, stride, g.count, sums);
  }
  for (int c = first_column + preloads * row_lanes * 4; c < width; c += row_lanes * 4)
    accumulate(load4(b, c, width, vector), u + c, stride, g.count, sums);
  scatter_sums<T, row_lanes>(sums);
  if (first_holder<T, row_lanes>()) {
#pragma unroll
    for (int i = 0; i < (T + row_lanes - 1) / row_lanes; ++i)
      results[(first_sum<T, row_lanes>() + i) * block_rows + threadIdx.x / row_lanes] = sums[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < outputs; ++i) {
    const int e = threadIdx.x + i * threads, t = e / block_rows;
    const int64_t row = first_row + e % block_rows;
    if (t < g.count && row < a.out)
      static_cast<Y*>(a.y)[a.rows[g.first + t] * a.ld_y + row] = narrow<Y>(before[i] + results[e]);
  }
}

// Whether all loads of four values of B are aligned.
bool reads_vectors(const DecodeArgs& a) {
  const size_t unit = a.adapter_dtype == DType::float32 ? 16 : 8;
  bool result = true;
  for (int i = 0; i < a.num_groups; ++i) {
    const DecodeGroup& g = a.groups[i];
    result &= (all_columns(g) - g.experts) % 4 == 0 && aligned(g.B, unit);
  }
  return result;
}

}  // namespace

int decode_expand(const DecodeArgs& a, const float* partial, int splits, int columns, void* stream) {
  if (check_decode_expand(a, partial, splits, columns)) return invalid_argument;
  const int stride = (columns + 3) / 4 * 4;
  const unsigned blocks = unsigned((a.out + block_rows - 1) / block_rows);
  return with_dtypes(a.dtype, a.adapter_dtype, [&](auto y, auto w) {
    return with_tokens(a, [&](auto tokens) {
      constexpr int T = decltype(tokens)::value;
      const size_t shared = sizeof(float) * (size_t(T) * stride + T * block_rows);
      const LaunchShape shape = {blocks, unsigned(a.num_groups), 1, threads, shared, true};
      return launch(decode_expand_kernel<decltype(y), decltype(w), T>, shape, stream, a, partial, splits, columns,
                    stride, reads_vectors(a));
    });
  });
}

}  // namespace gci
