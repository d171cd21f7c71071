// One new token of each sequence through ALoRA's bottleneck (arXiv 2405.17830): projected, appended to the cache, and
// attending to all of it; see common/decode.h.
#include "common/decode.h"
#include "cpu/dot.h"
#include "cpu/softmax.h"

namespace gci::GCI_ISA {
namespace {

// u = softmax(q . k) v for one head of D columns (0: `columns`, known when it runs), over the keys that are seen.
// scores holds `keys` floats; rows of kv are `row` numbers apart, v lies `rank` numbers behind k.
template <int D, typename X>
void attend_head(const float* q, const X* kv, int64_t row, int64_t rank, int64_t keys, int columns,
                 const int32_t* segments, int32_t own, float* scores, float* u) {
  const int d = D ? D : columns;
  const auto seen = [&](int64_t key) { return !segments || segments[key] == own; };
  float largest = -__builtin_inff();
  for (int64_t key = 0; key < keys; ++key) {
    float s = 0;
    for (int c = 0; c < d; ++c) s += q[c] * widen(kv[key * row + c]);
    scores[key] = seen(key) ? s : -__builtin_inff();
    largest = scores[key] > largest ? scores[key] : largest;
  }
  // A score of NaN is not the largest, and stays what it is.
  for (int64_t key = 0; key < keys; ++key) scores[key] = exponential(scores[key] - largest);
  float sum = 0;
  for (int c = 0; c < d; ++c) u[c] = 0;
  for (int64_t key = 0; key < keys; ++key) {
    if (!seen(key)) continue;  // what lies there may be anything
    sum += scores[key];
    for (int c = 0; c < d; ++c) u[c] += scores[key] * widen(kv[key * row + rank + c]);
  }
  for (int c = 0; c < d; ++c) u[c] /= sum;
}

template <typename X>
void attend_all(const AttendArgs& a, const float* q, const X* kv, int64_t keys, const int32_t* segments, int32_t own,
                float* scores, float* u) {
  const int d = a.rank / a.heads;
  const auto head = d == 4    ? attend_head<4, X>
                    : d == 8  ? attend_head<8, X>
                    : d == 16 ? attend_head<16, X>
                    : d == 32 ? attend_head<32, X>
                              : attend_head<0, X>;
  for (int h = 0; h < a.heads; ++h)
    head(q + h * d, kv + h * d, 2 * a.rank, a.rank, keys, d, segments, own, scores, u + h * d);
}

template <typename X, typename W>
void step(const AttendArgs& a, int64_t b, float* workspace) {
  const int64_t rank = a.rank, keys = int64_t(*a.past) + 1;
  float *x = workspace, *z = x + a.in, *qkv = z + rank, *scores = qkv + 3 * rank;
  widen_row(static_cast<const X*>(a.x) + b * a.ld_x, a.in, x);
  for (int64_t c = 0; c < rank; ++c) dot<1>(static_cast<const W*>(a.A) + c * a.in, x, a.in, a.in, z + c);
  for (int64_t c = 0; c < 3 * rank; ++c) dot<1>(static_cast<const W*>(a.qkv) + c * rank, z, rank, rank, qkv + c);
  X* kv = static_cast<X*>(a.kv) + b * a.stride_kv;
  for (int64_t c = 0; c < 2 * rank; ++c) kv[(keys - 1) * 2 * rank + c] = narrow<X>(qkv[rank + c]);
  const float scale = 1.0f / sqrtf(float(a.rank / a.heads));
  for (int64_t c = 0; c < rank; ++c) qkv[c] *= scale;
  const int32_t* segments = a.segments ? a.segments + b * a.ld_segments : nullptr;
  float* u = a.u + b * rank;
  if (segments && segments[keys - 1] < 0)
    for (int64_t c = 0; c < rank; ++c) u[c] = 0;
  else
    attend_all<X>(a, qkv, kv, keys, segments, segments ? segments[keys - 1] : 0, scores, u);
  if (a.residual)
    for (int64_t c = 0; c < rank; ++c) u[c] += z[c];
}

template <typename X, typename W>
void steps(const AttendArgs& a, float* workspace, int threads) {
  const int64_t each = a.in + 4 * a.rank + *a.past + 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (a.batch > 1)
  for (int64_t b = 0; b < a.batch; ++b) step<X, W>(a, b, workspace + b * each);
}

}  // namespace

void attend(const AttendArgs& a, float* workspace, int threads) {
  const bool wide = a.adapter_dtype == DType::float32;
  if (a.dtype == DType::float32) return steps<float, float>(a, workspace, threads);
  if (a.dtype == DType::bfloat16)
    return wide ? steps<bfloat16, float>(a, workspace, threads) : steps<bfloat16, bfloat16>(a, workspace, threads);
  return wide ? steps<float16, float>(a, workspace, threads) : steps<float16, float16>(a, workspace, threads);
}

}  // namespace gci::GCI_ISA
