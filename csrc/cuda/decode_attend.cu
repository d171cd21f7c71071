// The first half of ALoRA's decoding step (arXiv 2405.17830), one block for each sequence's new token: z = x @ A.T,
// [q | k | v] = z @ qkv.T; k and v are appended to the cache, and q attends to all of it.
//
// A thread has four columns of one head and a strided share of the keys, with its own online softmax; neighbouring
// threads have the rest of the row, so that rows are read whole. Until all keys are done, threads exchange only the
// sums of a head's columns, which make a score.
#include "cuda/dispatch.h"

namespace gci {
namespace {

constexpr int threads = 512, warps = threads / 32;
constexpr int rows_at_once = 16;      // of A, that a warp multiplies
constexpr int part = 4;               // columns of a thread
constexpr int state_size = part + 2;  // largest score, sum of weights, weighted sum of v
static_assert(32 * part == max_decode_head_size, "a head's threads exchange its scores within a warp");

// Keys that a thread loads before it uses the first one.
template <typename X>
constexpr int keys_at_once = sizeof(X) == 2 ? 8 : 4;

// sums[i] += row first + i of A times x, this thread's share of both.
template <int V, typename X, typename W>
__device__ inline void accumulate(const X* x, const W* A, int first, int rank, int64_t in,
                                  float (&sums)[rows_at_once]) {
#pragma unroll 1
  for (int64_t k = int64_t(threadIdx.x) * V; k < in; k += threads * V) {
    const Pack<X, V> value = load<V>(x + k);
    Pack<W, V> rows[rows_at_once];
#pragma unroll
    for (int i = 0; i < rows_at_once; ++i) rows[i] = load<V>(A + min(first + i, rank - 1) * in + k);
#pragma unroll
    for (int i = 0; i < rows_at_once; ++i)
#pragma unroll
      for (int j = 0; j < V; ++j) sums[i] += widen(rows[i].v[j]) * widen(value.v[j]);
  }
}

// z = x @ A.T; `scratch` holds warps * rows_at_once floats. Has barriers, the last one at its end.
template <typename X, typename W>
__device__ inline void project(const X* x, const W* A, int rank, int64_t in, bool vector, float* scratch, float* z) {
  for (int first = 0; first < rank; first += rows_at_once) {
    float sums[rows_at_once] = {};
    if (vector)
      accumulate<16 / sizeof(W)>(x, A, first, rank, in, sums);
    else
      accumulate<1>(x, A, first, rank, in, sums);
    scatter_sums<rows_at_once, 32>(sums);
    if (first_holder<rows_at_once, 32>()) scratch[warp_id() * rows_at_once + first_sum<rows_at_once, 32>()] = sums[0];
    __syncthreads();
    if (const int i = threadIdx.x; i < rows_at_once && first + i < rank) {
      float sum = 0;
      for (int w = 0; w < warps; ++w) sum += scratch[w * rows_at_once + i];
      z[first + i] = sum;
    }
    __syncthreads();
  }
}

// Writes the scaled q into shared memory, and k and v into the new row of the cache. Eight lanes share a row of qkv.
template <typename X, typename W>
__device__ inline void make_qkv(const float* z, const W* qkv, int rank, float scale, float* q, X* row) {
  constexpr int lanes = 8;
  for (int first = 0; first < 3 * rank; first += threads / lanes) {
    const int j = first + threadIdx.x / lanes;
    float sum = 0;
    if (j < 3 * rank)
      for (int k = threadIdx.x % lanes; k < rank; k += lanes) sum += widen(qkv[j * rank + k]) * z[k];
    sum = sum_lanes<lanes>(sum);
    if (threadIdx.x % lanes || j >= 3 * rank) continue;
    if (j < rank)
      q[j] = scale * sum;
    else
      row[j - rank] = narrow<X>(sum);
  }
}

struct State {  // of a softmax over some keys
  float largest, total, o[part];
};

// exp(v - largest), or 0 where no key was visible yet.
__device__ inline float weight(float v, float largest) { return largest == -INFINITY ? 0.0f : expf(v - largest); }

__device__ inline void merge_lanes(State& s, int offset) {
  const float largest = fmaxf(s.largest, __shfl_xor_sync(all_lanes, s.largest, offset));
  const float own = weight(s.largest, largest), others = __shfl_xor_sync(all_lanes, own, offset);
  s.largest = largest;
  s.total = s.total * own + __shfl_xor_sync(all_lanes, s.total, offset) * others;
#pragma unroll
  for (int i = 0; i < part; ++i) s.o[i] = s.o[i] * own + __shfl_xor_sync(all_lanes, s.o[i], offset) * others;
}

// The columns of a thread: `lanes` threads of a warp share a key, `parts` of those share a head.
struct Columns {
  int lanes, parts, head, column, width;  // column: its first, counted over all heads; width: how many, 0 for idle ones
};

__device__ inline Columns columns_of(int position, int lanes, int parts, int rank, int heads) {
  const int size = rank / heads, head = position / parts, within = position % parts * part;
  return {lanes, parts, head, head * size + within, head < heads ? max(min(size - within, part), 0) : 0};
}

// The softmax over this thread's keys, in their order.
template <typename X>
__device__ inline State attend(const Columns& p, const float* q, const X* kv, int64_t ld_kv, int64_t keys, int rank,
                               const int32_t* segments, int32_t own, bool vector) {
  constexpr int N = keys_at_once<X>;
  const int slots = threads / p.lanes, slot = threadIdx.x / p.lanes;
  State s = {-INFINITY, 0, {}};
  float query[part];
#pragma unroll
  for (int i = 0; i < part; ++i) query[i] = i < p.width ? q[p.column + i] : 0.0f;
  for (int64_t first = 0; first < keys; first += N * slots) {  // equally often in every thread: they exchange scores
    Pack<X, part> k[N], v[N];
    bool visible[N];
    float score[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int64_t key = first + n * slots + slot;
      visible[n] = key < keys && (!segments || segments[key] == own);
      const X* row = kv + key * ld_kv + p.column;
      const int width = visible[n] ? p.width : 0;  // keys that are not visible may be NaN, and are not read
      k[n] = load4(row, 0, width, vector);
      v[n] = load4(row + rank, 0, width, vector);
    }
    float largest = s.largest;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < part; ++i) sum += query[i] * widen(k[n].v[i]);
      for (int offset = 1; offset < p.parts; offset *= 2) sum += __shfl_xor_sync(all_lanes, sum, offset);
      score[n] = visible[n] ? sum : -INFINITY;
      largest = fmaxf(largest, score[n]);
    }
    const float kept = weight(s.largest, largest);
    s.largest = largest;
    s.total *= kept;
#pragma unroll
    for (int i = 0; i < part; ++i) s.o[i] *= kept;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float w = visible[n] ? weight(score[n], largest) : 0.0f;
      s.total += w;
#pragma unroll
      for (int i = 0; i < part; ++i) s.o[i] += w * widen(v[n].v[i]);
    }
  }
  for (int offset = p.lanes; offset < 32; offset *= 2) merge_lanes(s, offset);
  return s;
}

// The output of column `i` of state `index`, merged over all warps in their order.
__device__ inline float finish(const float* states, int lanes, int index, int i) {
  float largest = -INFINITY, total = 0, o = 0;
  for (int w = 0; w < warps; ++w) largest = fmaxf(largest, states[(w * lanes + index) * state_size]);
  for (int w = 0; w < warps; ++w) {
    const float* s = states + (w * lanes + index) * state_size;
    const float factor = weight(s[0], largest);
    total += factor * s[1];
    o += factor * s[2 + i];
  }
  return total == 0 ? 0 : o / total;
}

__device__ inline int round_to_power_of_two(int n) { return n > 1 ? 1 << (32 - __clz(n - 1)) : 1; }

// The group of a token, or num_groups where it has none.
__device__ inline int group_of(const DecodeArgs& a, int token) {
  int n = 0;
  while (n < a.num_groups && (token < a.groups[n].first || token >= a.groups[n].first + a.groups[n].count)) ++n;
  return n;
}

template <typename X, typename W>
__global__ void __launch_bounds__(threads, 1)
    decode_attend_kernel(const __grid_constant__ DecodeArgs a, const __grid_constant__ AttendArgs t, float* partial,
                         int columns, bool wide, bool quads) {
  __shared__ float states[warps * 32 * state_size], z[max_decode_columns], q[max_decode_columns];
  let_next_start();
  const int n = group_of(a, blockIdx.x);
  if (n == a.num_groups) return;  // the whole block
  const DecodeGroup& g = a.groups[n];
  const int rank = g.rank, heads = t.groups[n].heads;
  const bool residual = t.groups[n].residual;
  const int64_t sequence = a.rows[blockIdx.x], past = *t.past;
  float* u = partial + int64_t(blockIdx.x) * columns;
  if (past < 0 || past >= t.capacity) {
    for (int c = threadIdx.x; c < rank; c += threads) u[c] = NAN;
    return;
  }
  X* kv = static_cast<X*>(t.kv) + sequence * t.stride_kv;
  const W* qkv = static_cast<const W*>(t.groups[n].qkv);
  // Both are needed after z: prefetched while z is computed. Rows of kv are as wide as the widest group's.
  constexpr int line = 128;
  for (int64_t i = int64_t(threadIdx.x) * line; i < 3 * rank * rank * int64_t(sizeof(W)); i += threads * line)
    prefetch_to_l2(reinterpret_cast<const char*>(qkv) + i);
  for (int64_t i = int64_t(threadIdx.x) * line; i < past * t.ld_kv * int64_t(sizeof(X)); i += threads * line)
    prefetch_to_l2(reinterpret_cast<const char*>(kv) + i);

  project(static_cast<const X*>(a.x) + sequence * a.ld_x, static_cast<const W*>(g.A), rank, a.in, wide, states, z);
  const int size = rank / heads;
  make_qkv(z, qkv, rank, rsqrtf(float(size)), q, kv + past * t.ld_kv);
  __syncthreads();  // from here on this block can read the new row

  const int32_t* segments = t.segments ? t.segments + sequence * t.ld_segments : nullptr;
  const int32_t own = segments ? segments[past] : 0;
  const int64_t keys = own < 0 ? 0 : past + 1;
  const int parts = round_to_power_of_two((size + part - 1) / part), positions = heads * parts;
  const int lanes = min(round_to_power_of_two(positions), 32);
  for (int first = 0; first < positions; first += lanes) {
    const Columns own_columns = columns_of(first + threadIdx.x % lanes, lanes, parts, rank, heads);
    const State s = attend(own_columns, q, kv, t.ld_kv, keys, rank, segments, own, quads);
    if (lane_id() < lanes) {
      float* state = states + (warp_id() * lanes + lane_id()) * state_size;
      state[0] = s.largest;
      state[1] = s.total;
#pragma unroll
      for (int i = 0; i < part; ++i) state[2 + i] = s.o[i];
    }
    __syncthreads();
    const int index = threadIdx.x / part, i = threadIdx.x % part;
    if (index < lanes) {
      const Columns other = columns_of(first + index, lanes, parts, rank, heads);
      const int c = other.column + i;
      if (i < other.width) u[c] = finish(states, lanes, index, i) + (residual ? z[c] : 0.0f);
    }
    __syncthreads();
  }
}

// Whether all 16-byte loads of x and A are aligned.
bool reads_wide(const DecodeArgs& a) {
  const int64_t unit = a.dtype == DType::float32 ? 4 : 8;
  bool result = a.in % unit == 0 && a.ld_x % unit == 0 && aligned(a.x, 16);
  for (int n = 0; n < a.num_groups; ++n) result &= aligned(a.groups[n].A, 16);
  return result;
}

// Whether all loads of four values of kv are aligned and stay within one head.
bool reads_quads(const DecodeArgs& a, const AttendArgs& t) {
  bool result = t.stride_kv % part == 0 && t.ld_kv % part == 0 && aligned(t.kv, a.dtype == DType::float32 ? 16 : 8);
  for (int n = 0; n < a.num_groups; ++n) result &= a.groups[n].rank / t.groups[n].heads % part == 0;
  return result;
}

}  // namespace

int decode_attend(const DecodeArgs& a, const AttendArgs& t, float* partial, int columns, void* stream) {
  if (check_decode_attend(a, t, partial, columns)) return invalid_argument;
  const LaunchShape shape = {unsigned(a.tokens), 1, 1, threads, 0, false};
  return with_dtypes(a.dtype, a.adapter_dtype, [&](auto x, auto w) {
    return launch(decode_attend_kernel<decltype(x), decltype(w)>, shape, stream, a, t, partial, columns, reads_wide(a),
                  reads_quads(a, t));
  });
}

}  // namespace gci
