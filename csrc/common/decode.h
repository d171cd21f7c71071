// The arguments of a decoding step of an adapted layer, on a CPU (csrc/cpu/decode.cpp) and on a GPU (csrc/cuda): at
// most max_decode_tokens tokens. y already holds the base product; on a CPU it may be part of the step.
//
// Everything is passed by value, or by pointers that do not change from step to step, so that a captured CUDA graph can
// be replayed. Tokens may use different adapters: the tokens of one adapter form a group. A group's adapter is stacked
// expert by expert and contiguous. Sums are float32; results do not depend on scheduling.
#pragma once

#include <cstdint>

#include "common/kernels.h"
#include "common/limits.h"

namespace gci {

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

// The values of one token between A and B, and the same with the router's logits. Functions here are static, because
// kernel sources are compiled once per instruction set (cpu/vector.h).
static inline int adapter_columns(const DecodeGroup& g) { return g.rank * (g.experts > 0 ? g.experts : 1); }
static inline int all_columns(const DecodeGroup& g) { return adapter_columns(g) + g.experts; }

// y[t] += scaling * mix(x[t] @ A.T) @ B.T; mix is the identity, or multiplies by the gates softmax(x[t] @ router.T) as
// in gate.cpp.
struct DecodeArgs {
  const void* x;  // [tokens, in]
  void* y;        // [tokens, out]
  int64_t ld_x, ld_y;
  DType dtype;          // of x and y
  DType adapter_dtype;  // of A, router and B: dtype, or float32
  int64_t in, out;
  int tokens, num_groups;
  int rows[max_decode_tokens];
  DecodeGroup groups[max_decode_tokens];
};

// The first half of ALoRA's step, for one new token of each sequence. z = x @ A.T, [q | k | v] = z @ qkv.T; k and v are
// appended to the cache, and u = the attention of q to all of it, or that + z. u replaces the projected values
// (experts = 0). Token t of the step is the new token of sequence rows[t].
struct AttendGroup {  // belongs to the DecodeGroup with the same index
  const void* qkv;    // [3 * rank, rank], in the adapter's dtype
  int heads;
  bool residual;
};

struct AttendArgs {
  AttendGroup groups[max_decode_tokens];
  void* kv;  // [sequences, capacity, at least 2 * rank], in the dtype of x: k and v of a token side by side
  int64_t stride_kv, ld_kv, capacity;  // elements between sequences and between tokens; tokens that fit
  const int32_t* past;                 // how many tokens the cache holds before this one; read when the kernel runs
  // [sequences, >= past + 1]: a query attends to keys with its own number, to none where it is negative; null: all
  // keys.
  const int32_t* segments;
  int64_t ld_segments;
};

// The base layer, for the step on a CPU; weight null: y holds the base product.
struct DecodeBase {
  const void* weight;  // [out, in], in the dtype of x
  const void* bias;    // [out], or null
};

// The floats of a CPU's workspace: for the attention of one token, and for a whole step; `attend` is null but for
// ALoRA.
static inline int64_t attend_floats(int rank, int32_t past) { return 4 * int64_t(rank) + past + 1; }
static inline int64_t decode_floats(const DecodeArgs& a, const AttendArgs* attend) {
  int64_t floats = a.tokens * a.out;
  for (int i = 0; i < a.num_groups; ++i) {
    const DecodeGroup& g = a.groups[i];
    floats += g.count * (all_columns(g) + (attend ? attend_floats(g.rank, *attend->past) : 0));
  }
  return floats;
}

}  // namespace gci
