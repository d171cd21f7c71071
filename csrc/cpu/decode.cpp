// One decoding step of an adapted layer: all threads read the adapter once, its A and then its B, in order.
//
// With a token or a few there is nothing to pack and nothing to reuse: the time is that of reading the adapter, and of
// the two times that threads have to meet.
#include <omp.h>

#include "common/decode.h"
#include "cpu/dot.h"
#include "cpu/softmax.h"

namespace gci::GCI_ISA {
namespace {

typedef int32_t Index __attribute__((vector_size(sizeof(Vec))));

// Element i is element index[i] of a and b, b's counted from `lanes` on.
inline Vec shuffle(Vec a, Vec b, Index index) {
#if defined(__clang__)
  float all[2 * lanes];
  store(all, a), store(all + lanes, b);
  Vec chosen;
  for (int i = 0; i < lanes; ++i) chosen[i] = all[index[i]];
  return chosen;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// Neighbours added: those of a, then those of b.
inline Vec add_pairs(Vec a, Vec b) {
  Index even;
  for (int i = 0; i < lanes; ++i) even[i] = 2 * i;
  return shuffle(a, b, even) + shuffle(a, b, even + 1);
}

// Element i becomes the total of v[i].
inline Vec totals(Vec (&v)[lanes]) {
#pragma GCC unroll 4
  for (int count = lanes; count > 1; count /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < count / 2; ++i) v[i] = add_pairs(v[2 * i], v[2 * i + 1]);
  return v[0];
}

// Columns become rows, in log2(lanes) rounds: each moves the elements of one half-size block to its neighbour.
inline void transpose(Vec (&v)[lanes]) {
#pragma GCC unroll 4
  for (int half = lanes / 2; half > 0; half /= 2) {
    Index low, high;
    for (int i = 0; i < lanes; ++i) {
      low[i] = i & half ? lanes + i - half : i;
      high[i] = i & half ? lanes + i : i + half;
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i)
      if (!(i & half)) {
        const Vec a = v[i], b = v[i + half];
        v[i] = shuffle(a, b, low), v[i + half] = shuffle(a, b, high);
      }
  }
}

// sums[t] += tile[c] * u[t][c] for `Tokens` tokens.
template <int Tokens>
inline void add_tile(const Vec (&tile)[lanes], const float* u, int64_t columns, Vec* sums) {
  Vec sum[Tokens];
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) sum[t] = sums[t];
#pragma GCC unroll 16
  for (int c = 0; c < lanes; ++c)
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) sum[t] += tile[c] * u[t * columns + c];
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) sums[t] = sum[t];
}

// As expand_block, for more tokens: B is turned, a tile at a time, so that nothing is summed across a vector.
template <typename X, typename W>
inline void expand_turned(const W* B, int64_t columns, const float* u, X* const* y, int tokens, int64_t o) {
  const int64_t whole = columns / lanes * lanes;
  Vec sums[decode_max_tokens] = {};
  for (int64_t c = 0; c < whole; c += lanes) {
    Vec tile[lanes];
    for (int i = 0; i < lanes; ++i) tile[i] = load_wide(B + (o + i) * columns + c);
    transpose(tile);
    int t = 0;
    for (; t + 4 <= tokens; t += 4) add_tile<4>(tile, u + t * columns + c, columns, sums + t);
    for (; t < tokens; ++t) add_tile<1>(tile, u + t * columns + c, columns, sums + t);
  }
  for (int64_t c = whole; c < columns; ++c) {
    Vec column;
    for (int i = 0; i < lanes; ++i) column[i] = widen(B[(o + i) * columns + c]);
    for (int t = 0; t < tokens; ++t) sums[t] += column * u[t * columns + c];
  }
  for (int t = 0; t < tokens; ++t) store_narrow(y[t] + o, load_wide(y[t] + o) + sums[t]);
}

// y[t][o] += B[o] . u[t] for `lanes` rows of B and `Tokens` tokens of a group.
template <int Tokens, typename X, typename W>
inline void expand_block(const W* B, int64_t columns, const float* u, X* const* y, int64_t o) {
  const int64_t whole = columns / lanes * lanes;
  Vec sums[Tokens][lanes];
  float rest[Tokens][lanes] = {};
  for (int i = 0; i < lanes; ++i) {
    const W* b = B + (o + i) * columns;
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) sums[t][i] = Vec{};
    for (int64_t c = 0; c < whole; c += lanes) {
      const Vec v = load_wide(b + c);
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t) sums[t][i] += v * load(u + t * columns + c);
    }
    for (int64_t c = whole; c < columns; ++c)
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t) rest[t][i] += widen(b[c]) * u[t * columns + c];
  }
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t)
    store_narrow(y[t] + o, load_wide(y[t] + o) + (totals(sums[t]) + load(rest[t])));
}

// y[t][o] += B[o] . u[t] for the rows of B in [first, end) and all tokens of a group.
template <typename X, typename W>
void expand(const W* B, int64_t columns, const float* u, X* const* y, int tokens, int64_t first, int64_t end) {
  int64_t o = first;
  for (; o + lanes <= end; o += lanes) {
    if (tokens > 2)
      expand_turned<X>(B, columns, u, y, tokens, o);
    else if (tokens == 2)
      expand_block<2>(B, columns, u, y, o);
    else
      expand_block<1>(B, columns, u, y, o);
  }
  for (; o < end; ++o) {
    float sums[decode_max_tokens];
    dot_all(B + o * columns, u, columns, columns, tokens, sums);
    for (int t = 0; t < tokens; ++t) y[t][o] = narrow<X>(widen(y[t][o]) + sums[t]);
  }
}

inline int adapter_columns(const DecodeGroup& g) { return g.rank * (g.experts > 0 ? g.experts : 1); }

// u[t] = scaling * gate * h for the group's tokens; projected is [columns, tokens].
inline void mix(const DecodeGroup& g, const float* projected, float* u) {
  const int columns = adapter_columns(g);
  for (int t = 0; t < g.count; ++t) {
    float logits[max_experts], gates[max_experts];
    for (int n = 0; n < g.experts; ++n) logits[n] = projected[(columns + n) * g.count + t];
    if (g.experts > 0) softmax<float, float>(logits, gates, g.experts, g.top_k);
    for (int c = 0; c < columns; ++c) {
      const float gate = g.experts > 0 ? gates[c / g.rank] : 1.0f;
      u[t * columns + c] = g.scaling * gate * projected[c * g.count + t];
    }
  }
}

// What thread `me` of `team` takes of `count` things.
inline int64_t share(int64_t count, int64_t me, int64_t team) { return count * me / team; }

// projected [columns, tokens] of each group in turn = [A; router] @ x.T, by all threads of a team.
template <typename X, typename W>
void project_all(const DecodeArgs& a, float* wide, float* projected, int64_t me, int64_t team) {
  int64_t total_columns = 0;
  for (int g = 0; g < a.num_groups; ++g) total_columns += adapter_columns(a.groups[g]) + a.groups[g].experts;
  for (int t = 0; t < a.tokens; ++t) {  // in the groups' order
    const int64_t first = share(a.in, me, team);
    widen_row(static_cast<const X*>(a.x) + a.rows[t] * a.ld_x + first, share(a.in, me + 1, team) - first,
              wide + t * a.in + first);
  }
#pragma omp barrier
  int64_t before = 0;
  for (int i = 0; i < a.num_groups; ++i) {
    const DecodeGroup& g = a.groups[i];
    const int64_t columns = adapter_columns(g), all = columns + g.experts;
    const int64_t first = share(total_columns, me, team) - before, end = share(total_columns, me + 1, team) - before;
    for (int64_t c = first < 0 ? 0 : first; c < (end < all ? end : all); ++c) {
      const W* row = c < columns ? static_cast<const W*>(g.A) + c * a.in
                                 : static_cast<const W*>(g.router) + (c - columns) * a.in;
      dot_all(row, wide + g.first * a.in, a.in, a.in, g.count, projected + c * g.count);
    }
    before += all;
    projected += all * g.count;
  }
#pragma omp barrier
}

template <typename X, typename W>
void step(const DecodeArgs& a, const float* given, float* workspace, int threads) {
  float *wide = workspace, *projected = wide + a.tokens * a.in;
#pragma omp parallel num_threads(threads)
  {
    const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
    if (!given) project_all<X, W>(a, wide, projected, me, team);
    const float* h = projected;
    float u[decode_max_tokens * decode_max_columns];  // every thread its own: the gates are a few exponentials
    for (int i = 0; i < a.num_groups; ++i) {
      const DecodeGroup& g = a.groups[i];
      const int64_t columns = adapter_columns(g);
      if (given)
        for (int64_t c = 0; c < g.count * columns; ++c) u[c] = g.scaling * given[g.first * columns + c];
      else
        mix(g, h, u);
      X* y[decode_max_tokens];
      for (int t = 0; t < g.count; ++t) y[t] = static_cast<X*>(a.y) + a.rows[g.first + t] * a.ld_y;
      expand<X>(static_cast<const W*>(g.B), columns, u, y, g.count, share(a.out, me, team), share(a.out, me + 1, team));
      h += (columns + g.experts) * g.count;
    }
  }
}

}  // namespace

void decode(const DecodeArgs& a, const float* given, float* workspace, int threads) {
  const bool wide = a.adapter_dtype == DType::float32;
  if (a.dtype == DType::float32) return step<float, float>(a, given, workspace, threads);
  if (a.dtype == DType::bfloat16)
    return wide ? step<bfloat16, float>(a, given, workspace, threads)
                : step<bfloat16, bfloat16>(a, given, workspace, threads);
  return wide ? step<float16, float>(a, given, workspace, threads)
              : step<float16, float16>(a, given, workspace, threads);
}

}  // namespace gci::GCI_ISA
