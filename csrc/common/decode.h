// One decoding step of an adapted layer, the same on a CPU (csrc/cpu/decode.cpp) and on a GPU (csrc/cuda): at most
// decode_max_tokens tokens. Their base product is in y already; on a CPU it may be part of the step.
//
// Everything is passed by value or by pointers that stay as they are from step to step, so that a captured CUDA graph
// can be replayed. Tokens may use different adapters: those of one adapter form a group. A group's adapter is stacked
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

// y[t] += scaling * mix(x[t] @ A.T) @ B.T, mix being the identity, or the gates softmax(x[t] @ router.T) as in
// gate.cpp.
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

// ALoRA's first half, in place of x @ A.T: one new token of each sequence. z = x @ A.T, [q | k | v] = z @ qkv.T; k and
// v are written into the cache behind what it holds, and u = the attention of q to all of it, or that + z. u takes the
// place of the projected values (experts = 0). Token t of the step is the new one of sequence rows[t].
struct AttendGroup {  // what a DecodeGroup of the same number has beside A and B
  const void* qkv;    // [3 * rank, rank], in the adapter's dtype
  int heads;
  bool residual;
};

struct AttendArgs {
  AttendGroup groups[decode_max_tokens];
  void* kv;  // [sequences, capacity, at least 2 * rank], in the dtype of x: k and v of a token side by side
  int64_t stride_kv, ld_kv, capacity;  // elements between sequences and between tokens; tokens that have a place
  const int32_t* past;                 // how many tokens the cache holds before this one; read when the kernel runs
  // [sequences, >= past + 1]: keys of the query's own number are seen, none where that is negative; null: all keys.
  const int32_t* segments;
  int64_t ld_segments;
};

// What a CPU multiplies the tokens with before it adds the adapters' part; weight null: y holds that product.
struct DecodeBase {
  const void* weight;  // [out, in], in the dtype of x
  const void* bias;    // [out], or null
};

// The floats that a CPU works in; `attend` is null but for ALoRA.
inline int64_t decode_floats(const DecodeArgs& a, const AttendArgs* attend) {
  int64_t floats = a.tokens * a.out;
  for (int i = 0; i < a.num_groups; ++i) {
    const DecodeGroup& g = a.groups[i];
    const int64_t columns = int64_t(g.rank) * (g.experts > 0 ? g.experts : 1) + g.experts;
    floats += g.count * (columns + (attend ? 4 * int64_t(g.rank) + *attend->past + 1 : 0));
  }
  return floats;
}

}  // namespace gci
