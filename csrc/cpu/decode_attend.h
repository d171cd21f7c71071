// ALoRA's attention (arXiv 2405.17830) in a decoding step: projects a sequence's new token, appends its key and value
// to the cache, and attends to all of it; see common/decode.h.
#pragma once

#include "common/decode.h"
#include "cpu/dot.h"
#include "cpu/softmax.h"

namespace gci::GCI_ISA {

// u = softmax(q . k) v for one head of D columns (0: `columns`, known at run time), over the keys of the query's
// segment. `scores` holds `keys` floats; rows of kv are `row` elements apart, v lies `rank` elements behind k.
template <int D, typename X>
void attend_head(const float* q, const X* kv, int64_t row, int64_t rank, int64_t keys, int columns,
                 const int32_t* segments, int32_t own, float* scores, float* u) {
  const int d = D ? D : columns;
  const auto visible = [&](int64_t key) { return !segments || segments[key] == own; };
  float largest = -__builtin_inff();
  for (int64_t key = 0; key < keys; ++key) {
    float s = 0;
    for (int c = 0; c < d; ++c) s += q[c] * widen(kv[key * row + c]);
    scores[key] = visible(key) ? s : -__builtin_inff();
    largest = scores[key] > largest ? scores[key] : largest;
  }
  // A NaN score is never the largest, and the subtraction keeps it.
  for (int64_t key = 0; key < keys; ++key) scores[key] = exponential(scores[key] - largest);
  float sum = 0;
  for (int c = 0; c < d; ++c) u[c] = 0;
  for (int64_t key = 0; key < keys; ++key) {
    if (!visible(key)) continue;  // that memory may hold anything
    sum += scores[key];
    for (int c = 0; c < d; ++c) u[c] += scores[key] * widen(kv[key * row + rank + c]);
  }
  for (int c = 0; c < d; ++c) u[c] /= sum;
}

template <typename X>
void attend_all(int heads, int rank, const float* q, const X* kv, int64_t row, int64_t keys, const int32_t* segments,
                int32_t own, float* scores, float* u) {
  const int d = rank / heads;
  const auto head = d == 4    ? attend_head<4, X>
                    : d == 8  ? attend_head<8, X>
                    : d == 16 ? attend_head<16, X>
                    : d == 32 ? attend_head<32, X>
                              : attend_head<0, X>;
  for (int h = 0; h < heads; ++h) head(q + h * d, kv + h * d, row, rank, keys, d, segments, own, scores, u + h * d);
}

// u [rank] for x [in], the new token of sequence `row`; the workspace holds attend_floats floats.
template <typename X, typename W>
void attend(const DecodeGroup& g, const AttendGroup& n, const AttendArgs& a, int64_t in, int row, const X* x,
            float* workspace, float* u) {
  const int64_t rank = g.rank, keys = int64_t(*a.past) + 1;
  float *z = workspace, *qkv = z + rank, *scores = qkv + 3 * rank;
  multiply_all(static_cast<const W*>(g.A), in, rank, &x, 1, z, 0);
  const float* projected = z;
  multiply_all(static_cast<const W*>(n.qkv), rank, 3 * rank, &projected, 1, qkv, 0);
  X* kv = static_cast<X*>(a.kv) + row * a.stride_kv;
  for (int64_t c = 0; c < 2 * rank; ++c) kv[(keys - 1) * a.ld_kv + c] = narrow<X>(qkv[rank + c]);
  const float scale = 1.0f / sqrtf(float(g.rank / n.heads));
  for (int64_t c = 0; c < rank; ++c) qkv[c] *= scale;
  const int32_t* segments = a.segments ? a.segments + row * a.ld_segments : nullptr;
  const int32_t own = segments ? segments[keys - 1] : 0;
  if (own < 0)
    for (int64_t c = 0; c < rank; ++c) u[c] = 0;
  else
    attend_all<X>(n.heads, g.rank, qkv, kv, a.ld_kv, keys, segments, own, scores, u);
  if (n.residual)
    for (int64_t c = 0; c < rank; ++c) u[c] += z[c];
}

}  // namespace gci::GCI_ISA
