// ALoRA's attention (arXiv 2405.17830): causal attention with heads of a few columns, without a [time, keys] matrix.
//
// Where a head is 4 columns wide, a product has too few terms a sum to vectorise. So vectors run along the keys: k and
// v are packed once as tiles [head_size][block_keys], a score is head_size multiply-adds with a broadcast query value,
// and every lane keeps its own running maximum, sum and output, which are merged once at the end of a row.
//
// A task is one head of one batch row, or one of its `parts`, which takes every parts-th block of queries. No two tasks
// write to the same memory, so that results do not depend on which thread runs them.
#include <omp.h>

#include "common/limits.h"
#include "cpu/lanes.h"

namespace gci::GCI_ISA {
namespace {

constexpr int block_keys = attention_block_keys, block_queries = attention_block_queries;
constexpr int block_values = 256;  // of the queries of a block, at most: they stay in the cache
static_assert(max_head_size <= block_values, "a block holds at least one query");

// The sum of a vector's elements, by halving.
template <typename A, int Count>
inline A total_of(const A* p) {
  if constexpr (Count == 2) {
    return p[0] + p[1];
  } else {
    typedef A Half __attribute__((vector_size(Count / 2 * sizeof(A))));
    Half low, high;
    __builtin_memcpy(&low, p, sizeof low);
    __builtin_memcpy(&high, p + Count / 2, sizeof high);
    low += high;
    A rest[Count / 2];
    __builtin_memcpy(rest, &low, sizeof low);
    return total_of<A, Count / 2>(rest);
  }
}
template <typename A>
inline A total_of(Vector<A> v) {
  A all[Lanes<A>::count];
  put(all, v);
  return total_of<A, Lanes<A>::count>(all);
}

// finish(row, key, sum over i < depth of a[row * stride_row + i * stride_i] * m[i][key]), a vector of keys at a time.
template <typename A, int Rows, int Vectors, typename Finish>
inline void product_tile(const A* a, int64_t stride_row, int64_t stride_i, const A* m, int depth, int row, int key,
                         Finish finish) {
  Vector<A> sum[Rows][Vectors] = {};
  a += row * stride_row;
  m += key;
  for (int i = 0; i < depth; ++i) {
    Vector<A> operand[Vectors];
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) operand[j] = fetch(m + i * block_keys + j * Lanes<A>::count);
#pragma GCC unroll 4
    for (int n = 0; n < Rows; ++n) {
      const A scalar = a[n * stride_row + i * stride_i];
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) sum[n][j] += scalar * operand[j];
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < Rows; ++n)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) finish(row + n, key + j * Lanes<A>::count, sum[n][j]);
}

#if defined(__AVX512F__)
constexpr int wide = 4;  // 4 x wide accumulators, wide operands and some temporaries fit in the registers
#else
constexpr int wide = 2;
#endif

template <typename A, int Rows, typename Finish>
inline void product_rows(const A* a, int64_t stride_row, int64_t stride_i, const A* m, int depth, int row, int keys,
                         Finish finish) {
  int key = 0;
  for (; key + wide * Lanes<A>::count <= keys; key += wide * Lanes<A>::count)
    product_tile<A, Rows, wide>(a, stride_row, stride_i, m, depth, row, key, finish);
  for (; key < keys; key += Lanes<A>::count)
    product_tile<A, Rows, 1>(a, stride_row, stride_i, m, depth, row, key, finish);
}

// keys is a multiple of the vector.
template <typename A, typename Finish>
inline void product(const A* a, int64_t stride_row, int64_t stride_i, const A* m, int depth, int rows, int keys,
                    Finish finish) {
  int row = 0;
  for (; row + 4 <= rows; row += 4) product_rows<A, 4>(a, stride_row, stride_i, m, depth, row, keys, finish);
  for (; row < rows; ++row) product_rows<A, 1>(a, stride_row, stride_i, m, depth, row, keys, finish);
}

// sum[row][column] += p[row][key] * m[column][key], lane by lane.
template <typename A, int Rows, int Columns>
inline void lane_tile(const A* p, const A* m, Vector<A>* sum, int columns, int keys) {
  Vector<A> s[Rows][Columns];
#pragma GCC unroll 4
  for (int n = 0; n < Rows; ++n)
#pragma GCC unroll 4
    for (int c = 0; c < Columns; ++c) s[n][c] = sum[n * columns + c];
  for (int key = 0; key < keys; key += Lanes<A>::count) {
    Vector<A> operand[Columns];
#pragma GCC unroll 4
    for (int c = 0; c < Columns; ++c) operand[c] = fetch(m + c * block_keys + key);
#pragma GCC unroll 4
    for (int n = 0; n < Rows; ++n) {
      const Vector<A> scalar = fetch(p + n * block_keys + key);
#pragma GCC unroll 4
      for (int c = 0; c < Columns; ++c) s[n][c] += scalar * operand[c];
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < Rows; ++n)
#pragma GCC unroll 4
    for (int c = 0; c < Columns; ++c) sum[n * columns + c] = s[n][c];
}

template <typename A, int Rows>
inline void lane_rows(const A* p, const A* m, Vector<A>* sum, int columns, int keys) {
  int c = 0;
  for (; c + wide <= columns; c += wide) lane_tile<A, Rows, wide>(p, m + c * block_keys, sum + c, columns, keys);
  for (; c < columns; ++c) lane_tile<A, Rows, 1>(p, m + c * block_keys, sum + c, columns, keys);
}

template <typename A>
inline void lane_product(const A* p, const A* m, Vector<A>* sum, int rows, int columns, int keys) {
  int n = 0;
  for (; n + 4 <= rows; n += 4) lane_rows<A, 4>(p + n * block_keys, m, sum + n * columns, columns, keys);
  for (; n < rows; ++n) lane_rows<A, 1>(p + n * block_keys, m, sum + n * columns, columns, keys);
}

enum class Tile { skipped, whole, partial };

// Consecutive queries of one head.
struct Block {
  int64_t first;       // the first query's position among the keys
  int rows, columns;   // queries; the head's size
  const int32_t* ids;  // the segment of every key of this batch row, or null

  // Whether these queries attend to all of the keys [start, start + count), to some or to none. Ids may have any order.
  Tile classify(int64_t start, int count) const {
    const Tile causal = start + count - 1 <= first ? Tile::whole : Tile::partial;
    if (!ids) return causal;
    // Queries with a negative id are padding and attend to nothing.
    int32_t low = INT32_MAX, high = -1, key_low = INT32_MAX, key_high = INT32_MIN;
    bool any_padding = false;
    for (int i = 0; i < rows; ++i) {
      const int32_t id = ids[first + i];
      any_padding |= id < 0;
      low = id >= 0 && id < low ? id : low;
      high = id > high ? id : high;
    }
    const int64_t end = min_of(start + count, first + rows);
    for (int64_t j = start; j < end; ++j) {
      key_low = ids[j] < key_low ? ids[j] : key_low;
      key_high = ids[j] > key_high ? ids[j] : key_high;
    }
    if (key_high < low || key_low > high) return Tile::skipped;
    const bool uniform = !any_padding && low == high && key_low == low && key_high == low;
    return uniform ? causal : Tile::partial;
  }

  // values[row][key] = hidden wherever the query does not attend to the key.
  template <typename A>
  void hide(int64_t start, int count, A hidden, A* values) const {
    for (int i = 0; i < rows; ++i) {
      const int64_t position = first + i;
      A* row = values + i * block_keys;
      const int visible = int(min_of(count, position - start + 1));  // may be negative
      const int32_t id = ids ? ids[position] : 0;
      for (int j = 0; j < count; ++j) row[j] = j < visible ? row[j] : hidden;
      if (!ids) continue;
      for (int j = 0; j < visible; ++j) row[j] = id >= 0 && ids[start + j] == id ? row[j] : hidden;
    }
  }

  // visit(start, count, tile) for every block of keys that some query attends to; count is a multiple of the vector.
  template <typename A, typename Visit>
  void each_tile(Visit visit) const {
    const int64_t edge = first + rows;
    for (int64_t start = 0; start < edge; start += block_keys) {
      const int64_t left = (edge - start + Lanes<A>::count - 1) / Lanes<A>::count * Lanes<A>::count;
      const int count = int(min_of(block_keys, left));
      const Tile tile = classify(start, count);
      if (tile != Tile::skipped) visit(start, count, tile);
    }
  }
};

// One block of queries against the panels of a head, [keys / block_keys][k: columns, v: columns][block_keys]; q is
// scaled by 1 / sqrt(columns). A lane without a visible key has a maximum of -inf and a sum of 0.
template <typename A>
void forward_block(const Block& b, const A* q, const A* panels, A* o, A* lse) {
  typedef Vector<A> V;
  constexpr int step = Lanes<A>::count;
  const A infinity = A(__builtin_inf());
  alignas(64) A p[block_queries * block_keys];
  V sum[block_values] = {}, total[block_queries] = {}, top[block_queries];
  for (int i = 0; i < b.rows; ++i) top[i] = V{} - infinity;
  b.template each_tile<A>([&](int64_t start, int count, Tile tile) {
    const A *k = panels + start * 2 * b.columns, *v = k + b.columns * block_keys;
    product(q, b.columns, 1, k, b.columns, b.rows, count,
            [&](int row, int key, V s) { put(p + row * block_keys + key, s); });
    if (tile == Tile::partial) b.hide(start, count, -infinity, p);
    for (int i = 0; i < b.rows; ++i) {
      A* row = p + i * block_keys;
      V best = top[i];
      for (int j = 0; j < count; j += step) best = larger<A>(best, fetch(row + j));
      const V base = best == -infinity ? V{} : best;  // -inf - -inf would be NaN
      const V factor = exponential(V(top[i] - base));
      top[i] = best;
      V added = {};
      for (int j = 0; j < count; j += step) {
        const V power = exponential(V(fetch(row + j) - base));
        added += power;
        put(row + j, power);
      }
      total[i] = total[i] * factor + added;
      for (int c = 0; c < b.columns; ++c) sum[i * b.columns + c] *= factor;
    }
    lane_product(p, v, sum, b.rows, b.columns, count);
  });
  for (int i = 0; i < b.rows; ++i) {
    const bool none = b.ids && b.ids[b.first + i] < 0;
    A best = -infinity;
    for (int j = 0; j < step; ++j) best = top[i][j] > best ? top[i][j] : best;
    const V factor = exponential(V(top[i] - (best == -infinity ? A(0) : best)));
    const A whole = total_of<A>(total[i] * factor);
    for (int c = 0; c < b.columns; ++c)
      o[i * b.columns + c] = none ? A(0) : total_of<A>(sum[i * b.columns + c] * factor) / whole;
    lse[i] = none ? -infinity : A(best + log(double(whole)));
  }
}

// As forward_block; delta[row] = sum(d_o * o). Adds these queries' gradients of k and v to d_panels, which has the
// layout of panels.
template <typename A>
void backward_block(const Block& b, const A* q, const A* d_o, const A* lse, const A* delta, const A* panels,
                    A* d_panels, A* dq) {
  typedef Vector<A> V;
  alignas(64) A p[block_queries * block_keys], ds[block_queries * block_keys];
  V sum[block_values] = {};
  const int columns = b.columns;
  b.template each_tile<A>([&](int64_t start, int count, Tile tile) {
    const A *k = panels + start * 2 * columns, *v = k + columns * block_keys;
    A *dk = d_panels + start * 2 * columns, *dv = dk + columns * block_keys;
    product(q, columns, 1, k, columns, b.rows, count,
            [&](int row, int key, V s) { put(p + row * block_keys + key, exponential(V(s - lse[row]))); });
    if (tile == Tile::partial) b.hide(start, count, A(0), p);
    product(d_o, columns, 1, v, columns, b.rows, count, [&](int row, int key, V dp) {
      put(ds + row * block_keys + key, V(fetch(p + row * block_keys + key) * (dp - delta[row])));
    });
    lane_product(ds, k, sum, b.rows, columns, count);
    product(d_o, 1, columns, p, b.rows, columns, count, [&](int column, int key, V s) {
      put(dv + column * block_keys + key, V(s + fetch(dv + column * block_keys + key)));
    });
    product(q, 1, columns, ds, b.rows, columns, count, [&](int column, int key, V s) {
      put(dk + column * block_keys + key, V(s + fetch(dk + column * block_keys + key)));
    });
  });
  for (int i = 0; i < b.rows * columns; ++i) dq[i] = total_of<A>(sum[i]);
}

// One head of one batch row, and its addresses.
struct Head {
  int64_t batch, head;
  const int32_t* ids;

  Head(const AttentionArgs& a, int64_t index) : batch(index / a.heads), head(index % a.heads) {
    ids = a.segments ? a.segments + batch * a.keys : nullptr;
  }
  template <typename T>
  const T* rows(const AttentionArgs& a, const AttentionRows& m) const {
    return static_cast<const T*>(m.data) + batch * m.stride_batch + head * a.head_size;
  }
  // The same in a contiguous output [batch, rows, heads * head_size].
  template <typename T>
  T* out(const AttentionArgs& a, void* data, int64_t rows) const {
    return static_cast<T*>(data) + (batch * rows * a.heads + head) * a.head_size;
  }
};

// Packs k and v of a head into tiles. Padding, whose memory may hold anything, becomes zeros.
template <typename T, typename A>
void pack(const AttentionArgs& a, const Head& head, A* panels) {
  const T *k = head.rows<T>(a, a.k), *v = head.rows<T>(a, a.v);
  const int d = a.head_size;
  for (int64_t start = 0; start < a.keys; start += block_keys, panels += 2 * d * block_keys)
    for (int j = 0; j < block_keys; ++j) {
      const int64_t key = start + j;
      const bool real = key < a.keys && !(head.ids && head.ids[key] < 0);
      for (int c = 0; c < d; ++c) {
        panels[c * block_keys + j] = real ? A(widen(k[key * a.k.stride_row + c])) : A(0);
        panels[(d + c) * block_keys + j] = real ? A(widen(v[key * a.v.stride_row + c])) : A(0);
      }
    }
}

// to[row][column] = factor * from, and 0 for padding.
template <typename T, typename A>
void load_rows(const T* from, int64_t stride, const Block& b, A factor, A* to) {
  for (int i = 0; i < b.rows; ++i) {
    const bool real = !(b.ids && b.ids[b.first + i] < 0);
    for (int c = 0; c < b.columns; ++c)
      to[i * b.columns + c] = real ? A(factor * A(widen(from[i * stride + c]))) : A(0);
  }
}

template <typename T, typename A>
void store_rows(const A* from, const Block& b, A factor, T* to, int64_t stride) {
  for (int i = 0; i < b.rows; ++i)
    for (int c = 0; c < b.columns; ++c) to[i * stride + c] = narrow<T>(A(factor * from[i * b.columns + c]));
}

inline int64_t rows_of_block(const AttentionArgs& a) { return min_of(block_queries, block_values / a.head_size); }

// run(block, first query) for the blocks of queries that belong to this part.
template <typename Run>
void each_block(const AttentionArgs& a, const Head& head, int64_t part, Run run) {
  const int64_t size = rows_of_block(a);
  for (int64_t t = part * size; t < a.time; t += a.parts * size)
    run(Block{a.keys - a.time + t, int(min_of(size, a.time - t)), a.head_size, head.ids}, t);
}

inline int64_t panel_size(const AttentionArgs& a) {
  return (a.keys + block_keys - 1) / block_keys * block_keys * 2 * a.head_size;
}

template <typename T>
void forward(const AttentionArgs& a, void* o_out, void* lse_out, void* workspace, int threads) {
  typedef typename Accumulator<T>::type A;
  const A scale = A(1 / sqrt(double(a.head_size)));
  const int64_t width = a.heads * a.head_size;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t task = 0; task < a.batch * a.heads * a.parts; ++task) {
    const Head head(a, task / a.parts);
    A* panels = static_cast<A*>(workspace) + omp_get_thread_num() * panel_size(a);
    pack<T>(a, head, panels);
    each_block(a, head, task % a.parts, [&](const Block& b, int64_t t) {
      A q[block_values], o[block_values];
      load_rows(head.rows<T>(a, a.q) + t * a.q.stride_row, a.q.stride_row, b, scale, q);
      forward_block<A>(b, q, panels, o, static_cast<A*>(lse_out) + task / a.parts * a.time + t);
      store_rows(o, b, A(1), head.out<T>(a, o_out, a.time) + t * width, width);
    });
  }
}

// out[key][column] = the sum of all parts' panels, which follow one another in memory.
template <typename T, typename A>
void unpack(const AttentionArgs& a, const A* panels, T* out) {
  const int d = a.head_size;
  const int64_t size = panel_size(a);
  for (int64_t key = 0; key < a.keys; ++key)
    for (int c = 0; c < d; ++c) {
      const A* at = panels + (key / block_keys * 2 * d + c) * block_keys + key % block_keys;
      A sum = at[0];
      for (int part = 1; part < a.parts; ++part) sum += at[part * size];
      out[key * a.heads * d + c] = narrow<T>(sum);
    }
}

template <typename T>
void backward(const AttentionArgs& a, const AttentionRows& o_in, const AttentionRows& d_o_in, const void* lse_in,
              void* dq_out, void* dk_out, void* dv_out, void* workspace, int threads) {
  typedef typename Accumulator<T>::type A;
  const A scale = A(1 / sqrt(double(a.head_size)));
  const int64_t width = a.heads * a.head_size, size = panel_size(a), heads = a.batch * a.heads;
  A* gradients = static_cast<A*>(workspace) + threads * size;
  const auto write = [&](int64_t index, const A* d_panels) {
    const Head head(a, index);
    unpack<T>(a, d_panels, head.out<T>(a, dk_out, a.keys));
    unpack<T>(a, d_panels + a.head_size * block_keys, head.out<T>(a, dv_out, a.keys));
  };
#pragma omp parallel num_threads(threads)
  {
    A* panels = static_cast<A*>(workspace) + omp_get_thread_num() * size;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < heads * a.parts; ++task) {
      const Head head(a, task / a.parts);
      A* d_panels = gradients + (a.parts == 1 ? omp_get_thread_num() : task) * size;
      pack<T>(a, head, panels);
      memset(d_panels, 0, size * sizeof(A));
      each_block(a, head, task % a.parts, [&](const Block& b, int64_t t) {
        A q[block_values], d_o[block_values], o[block_values], dq[block_values];
        A lse[block_queries], delta[block_queries];
        load_rows(head.rows<T>(a, a.q) + t * a.q.stride_row, a.q.stride_row, b, scale, q);
        load_rows(head.rows<T>(a, d_o_in) + t * d_o_in.stride_row, d_o_in.stride_row, b, A(1), d_o);
        load_rows(head.rows<T>(a, o_in) + t * o_in.stride_row, o_in.stride_row, b, A(1), o);
        for (int i = 0; i < b.rows; ++i) {
          const A sum = static_cast<const A*>(lse_in)[task / a.parts * a.time + t + i];
          lse[i] = sum == -A(__builtin_inf()) ? -sum : sum;  // padding: every e^(score - lse) is 0
          delta[i] = 0;
          for (int c = i * a.head_size; c < (i + 1) * a.head_size; ++c) delta[i] += d_o[c] * o[c];
        }
        backward_block<A>(b, q, d_o, lse, delta, panels, d_panels, dq);
        store_rows(dq, b, scale, head.out<T>(a, dq_out, a.time) + t * width, width);
      });
      if (a.parts == 1) write(task, d_panels);
    }
    if (a.parts > 1) {
#pragma omp for schedule(static)
      for (int64_t index = 0; index < heads; ++index) write(index, gradients + index * a.parts * size);
    }
  }
}

void attention_forward(const AttentionArgs& a, void* o, void* lse, void* workspace, int threads) {
  if (a.dtype == DType::float64) return forward<double>(a, o, lse, workspace, threads);
  if (a.dtype == DType::float32) return forward<float>(a, o, lse, workspace, threads);
  forward<bfloat16>(a, o, lse, workspace, threads);
}

void attention_backward(const AttentionArgs& a, const AttentionRows& o, const AttentionRows& d_o, const void* lse,
                        void* dq, void* dk, void* dv, void* workspace, int threads) {
  if (a.dtype == DType::float64) return backward<double>(a, o, d_o, lse, dq, dk, dv, workspace, threads);
  if (a.dtype == DType::float32) return backward<float>(a, o, d_o, lse, dq, dk, dv, workspace, threads);
  backward<bfloat16>(a, o, d_o, lse, dq, dk, dv, workspace, threads);
}

}  // namespace

[[gnu::cold]] void add_attention(Kernels& table) {
  table.attention_forward = attention_forward;
  table.attention_backward = attention_backward;
}

}  // namespace gci::GCI_ISA
