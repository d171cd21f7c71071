// One decoding step of an adapted layer, the same on a CPU (csrc/cpu/decode.cpp) and on a GPU (csrc/cuda):
// at most decode_max_tokens tokens, whose base product is in y already.
//
// Everything is passed by value or by pointers that stay as they are from step to step, so that a captured CUDA graph can
// be replayed. Tokens may use different adapters: those of one adapter form a group. A group's adapter is stacked
// expert-major and has no gaps. Sums are float32; results do not depend on scheduling.
#pragma once

#include <cstdint>

#include "common/kernels.h"

namespace gci {

constexpr int decode_max_tokens = 16;
constexpr int decode_max_columns = 512;  // of A, router rows included

struct DecodeGroup {
  const void* A;       // [rank * max(experts, 1), in]
  const void* router;  // [experts, in]; null where experts is 0
  const void* B;       // [out, rank * max(experts, 1)]
  int rank;
  int experts;  // 0: LoRA, no gate
  int top_k;    // experts where all gates count
  float scaling;
  int first, count;  // its tokens: rows[first] to rows[first + count - 1] of x and y
};

// y[t] += scaling * mix(x[t] @ A.T) @ B.T, mix being the identity, or the gates softmax(x[t] @ router.T) as in gate.cpp.
struct DecodeArgs {
  const void* x;  // [tokens, in]
  void* y;        // [tokens, out]
  int64_t ld_x, ld_y;
  DType dtype;          // of x and y
  DType adapter_dtype;  // of A, router and B: dtype, or float32
  int64_t in, out;
  int tokens, num_groups;
  int rows[decode_max_tokens];
  DecodeGroup groups[decode_max_tokens];
};

// One new token of each of `batch` sequences: z = x @ A.T, [q | k | v] = z @ qkv.T; k and v are written into the cache
// behind what it holds, and u = the attention of q to all of it, or that + z. u then takes the place of the projected
// values in the second half of a decoding step (experts = 0).
struct AttendArgs {
  const void* x;  // [batch, in]
  int64_t ld_x;
  const void* A;    // [rank, in]
  const void* qkv;  // [3 * rank, rank]
  DType dtype;          // of x and of the cache
  DType adapter_dtype;  // of A and qkv: dtype, or float32
  int64_t in, batch;
  int rank, heads;
  bool residual;
  void* kv;  // [batch, capacity, 2 * rank]
  int64_t stride_kv, capacity;
  const int32_t* past;      // how many tokens the cache holds before this one; read when the kernel runs
  const int32_t* segments;  // [batch, >= past + 1]: keys of the query's own number are seen, none where that is negative
  int64_t ld_segments;      // null: all keys are seen
  float* u;                 // [batch, rank]
};

}  // namespace gci
