// One decoding step of an adapted layer (common/decode.h), which reads the weight and the adapter once.
//
// With few tokens nothing is packed or reused: the time goes into reading memory and into synchronising threads. There
// is one barrier, at the end. Free threads take tasks of the first half (x @ A.T, attention), then blocks of outputs. A
// block waits for the first half only when its base product is done. Results do not depend on which thread takes what.
#include "common/decode.h"

#include <omp.h>
#include <sched.h>

#include "cpu/decode_attend.h"
#include "cpu/dot.h"
#include "cpu/softmax.h"

namespace gci::GCI_ISA {
namespace {

// Transposes a lanes x lanes tile in log2(lanes) rounds, each of which swaps the off-diagonal blocks of one size.
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

// As expand_block, for more tokens: B is transposed tile by tile, so that nothing is summed across a vector.
template <typename W>
inline void expand_transposed(const W* B, int64_t columns, const float* u, float* const* y, int tokens, int64_t o) {
  const int64_t whole = columns / lanes * lanes;
  Vec sums[max_decode_tokens] = {};
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
  for (int t = 0; t < tokens; ++t) store(y[t] + o, load(y[t] + o) + sums[t]);
}

// y[t][o] += B[o] . u[t] for `lanes` rows of B and `Tokens` tokens of a group.
template <int Tokens, typename W>
inline void expand_block(const W* B, int64_t columns, const float* u, float* const* y, int64_t o) {
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
  for (int t = 0; t < Tokens; ++t) store(y[t] + o, load(y[t] + o) + (totals(sums[t]) + load(rest[t])));
}

// y[t][o] += B[o] . u[t] for the rows of B in [first, end) and all tokens of a group.
template <typename W>
void expand(const W* B, int64_t columns, const float* u, float* const* y, int tokens, int64_t first, int64_t end) {
  int64_t o = first;
  for (; o + lanes <= end; o += lanes) {
    if (tokens > 2)
      expand_transposed(B, columns, u, y, tokens, o);
    else if (tokens == 2)
      expand_block<2>(B, columns, u, y, o);
    else
      expand_block<1>(B, columns, u, y, o);
  }
  for (; o < end; ++o)
    for (int t = 0; t < tokens; ++t) {
      float sum = 0;
      for (int64_t c = 0; c < columns; ++c) sum += widen(B[o * columns + c]) * u[t * columns + c];
      y[t][o] += sum;
    }
}

// u = scaling * gate * h [tokens, columns] for the group's tokens; h is [tokens, all_columns].
inline void mix(const DecodeGroup& g, const float* h, float* u) {
  const int columns = adapter_columns(g);
  for (int t = 0; t < g.count; ++t, h += all_columns(g), u += columns) {
    float gates[max_experts];
    if (g.experts > 0) softmax<float, float>(h + columns, gates, g.experts, g.top_k);
    for (int c = 0; c < columns; ++c) u[c] = g.scaling * (g.experts > 0 ? gates[c / g.rank] : 1.0f) * h[c];
  }
}

inline int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

// The counters that the threads of a step share.
struct Progress {
  int tasks = 0, done = 0, blocks = 0;  // tasks taken, tasks finished, blocks taken
};

inline int take(int* counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED); }

template <typename X, typename W>
class Step {
 public:
  Step(const DecodeArgs& a, const AttendArgs* attend, const DecodeBase& base, float* workspace, int threads)
      : a_(a), attend_(attend), base_(base), sums_(workspace), h_(sums_ + a.tokens * a.out) {
    int64_t columns = 0, floats = 0;
    for (int i = 0; i < a.num_groups; ++i)
      columns += all_columns(a.groups[i]), floats += a.groups[i].count * int64_t(all_columns(a.groups[i]));
    scratch_ = h_ + floats;
    chunk_ = min_of(parts(columns, threads), lanes);
    block_ = parts(parts(a.out, int64_t(4) * threads), lanes) * lanes;
    for (int i = 0; i < a.num_groups; ++i) tasks_ += tasks_of(a.groups[i]);
    for (int t = 0; t < a.tokens; ++t) {
      x_[t] = static_cast<const X*>(a.x) + a.rows[t] * a.ld_x;
      y_[t] = sums_ + t * a.out;
    }
  }

  // The work of one thread.
  void work(Progress& progress) const {
    for (int i; (i = take(&progress.tasks)) < tasks_; __atomic_fetch_add(&progress.done, 1, __ATOMIC_RELEASE)) task(i);
    float u[max_decode_tokens * max_decode_columns];  // computed by every thread: the gates are a few exponentials
    bool mixed = false;
    int64_t pending[8];  // blocks whose base product is done, and whose adapters are not added yet
    int count = 0;
    for (int64_t o; (o = take(&progress.blocks) * block_) < a_.out;) {
      start(o, min_of(o + block_, a_.out));
      pending[count++] = o;
      const bool ready = __atomic_load_n(&progress.done, __ATOMIC_ACQUIRE) == tasks_;
      if (ready || count == 8) finish_all(progress, u, &mixed, pending, &count);
    }
    finish_all(progress, u, &mixed, pending, &count);
  }

 private:
  int64_t tasks_of(const DecodeGroup& g) const {
    return attend_ ? g.count : parts(adapter_columns(g), chunk_) + parts(g.experts, chunk_);
  }

  // A part of the first half: some columns of a group's h, or the attention of one of its tokens.
  void task(int64_t i) const {
    float *h = h_, *scratch = scratch_;
    int group = 0;
    for (; i >= tasks_of(a_.groups[group]); ++group) {
      const DecodeGroup& g = a_.groups[group];
      i -= tasks_of(g);
      h += g.count * int64_t(all_columns(g));
      if (attend_) scratch += g.count * attend_floats(g.rank, *attend_->past);
    }
    const DecodeGroup& g = a_.groups[group];
    if (attend_) {
      const int t = g.first + int(i);
      return attend<X, W>(g, attend_->groups[group], *attend_, a_.in, a_.rows[t], x_[t],
                          scratch + i * attend_floats(g.rank, *attend_->past), h + i * g.rank);
    }
    const int64_t columns = adapter_columns(g), of_A = parts(columns, chunk_);
    const bool routed = i >= of_A;
    const int64_t first = (routed ? i - of_A : i) * chunk_,
                  count = min_of(chunk_, (routed ? g.experts : columns) - first);
    multiply_all(static_cast<const W*>(routed ? g.router : g.A) + first * a_.in, a_.in, count, x_ + g.first, g.count,
                 h + (routed ? columns : 0) + first, all_columns(g));
  }

  // The base product of some outputs: computed, or read from y.
  void start(int64_t first, int64_t end) const {
    if (!base_.weight) {
      for (int t = 0; t < a_.tokens; ++t) widen_row(row_of_y(t) + first, end - first, y_[t] + first);
      return;
    }
    multiply_all(static_cast<const X*>(base_.weight) + first * a_.in, a_.in, end - first, x_, a_.tokens, sums_ + first,
                 a_.out);
    if (const X* bias = static_cast<const X*>(base_.bias))
      for (int t = 0; t < a_.tokens; ++t)
        for (int64_t o = first; o < end; ++o) y_[t][o] += widen(bias[o]);
  }

  void finish(const float* u, int64_t first, int64_t end) const {
    for (int i = 0; i < a_.num_groups; ++i) {
      const DecodeGroup& g = a_.groups[i];
      const int64_t columns = adapter_columns(g);
      expand(static_cast<const W*>(g.B), columns, u, y_ + g.first, g.count, first, end);
      u += g.count * columns;
    }
    for (int t = 0; t < a_.tokens; ++t) narrow_row(y_[t] + first, end - first, row_of_y(t) + first);
  }

  void finish_all(const Progress& progress, float* u, bool* mixed, const int64_t* pending, int* count) const {
    if (!*count) return;
    for (int tries = 0; __atomic_load_n(&progress.done, __ATOMIC_ACQUIRE) < tasks_; ++tries)
      if (tries > 1000) sched_yield();
    if (!*mixed) mix_all(u);
    *mixed = true;
    for (int i = 0; i < *count; ++i) finish(u, pending[i], min_of(pending[i] + block_, a_.out));
    *count = 0;
  }

  void mix_all(float* u) const {
    const float* h = h_;
    for (int i = 0; i < a_.num_groups; ++i) {
      const DecodeGroup& g = a_.groups[i];
      mix(g, h, u);
      h += g.count * int64_t(all_columns(g));
      u += g.count * int64_t(adapter_columns(g));
    }
  }

  X* row_of_y(int t) const { return static_cast<X*>(a_.y) + a_.rows[t] * a_.ld_y; }

  const DecodeArgs& a_;
  const AttendArgs* attend_;
  const DecodeBase& base_;
  float *sums_, *h_, *scratch_;  // [tokens, out]; h, group by group; the attention's workspace
  int64_t chunk_, block_, tasks_ = 0;
  const X* x_[max_decode_tokens];
  float* y_[max_decode_tokens];  // rows of sums_
};

template <typename X, typename W>
void run(const DecodeArgs& a, const AttendArgs* attend, const DecodeBase& base, float* workspace, int threads) {
  const Step<X, W> step(a, attend, base, workspace, threads);
  Progress progress;
#pragma omp parallel num_threads(threads)
  step.work(progress);
}

void decode(const DecodeArgs& a, const AttendArgs* attend, const DecodeBase& base, float* workspace, int threads) {
  const bool wide = a.adapter_dtype == DType::float32;
  if (a.dtype == DType::float32) return run<float, float>(a, attend, base, workspace, threads);
  if (a.dtype == DType::bfloat16)
    return wide ? run<bfloat16, float>(a, attend, base, workspace, threads)
                : run<bfloat16, bfloat16>(a, attend, base, workspace, threads);
  return wide ? run<float16, float>(a, attend, base, workspace, threads)
              : run<float16, float16>(a, attend, base, workspace, threads);
}

}  // namespace

[[gnu::cold]] void add_decode(Kernels& table) { table.decode = decode; }

}  // namespace gci::GCI_ISA
