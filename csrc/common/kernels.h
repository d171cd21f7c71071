// The interface of the CPU kernels: their arguments, and the table that holds one function for each of them.
//
// Conventions: tensors are row-major and given as a pointer and a leading dimension (ld_: elements between rows).
// Kernels allocate nothing, their workspaces come from the caller. `threads` is the number of threads of the OpenMP
// team. Results do not depend on scheduling.
#pragma once

#include <cstdint>

namespace gci {

enum class DType : int { float32 = 0, bfloat16 = 1, float64 = 2, float16 = 3 };

struct GateArgs {
  const void* projected;  // [tokens, experts * rank + experts]: x @ A.T, then the router's logits
  int64_t ld_projected;
  DType projected_dtype;  // of projected and du: dtype, or float32 where that is bfloat16
  DType dtype;            // of u and dprojected; gates and dgates are float64 where it is float64, else float32
  int64_t tokens;
  int experts;
  int rank;
  int top_k;  // experts where dense
  double scaling;
};

// [batch, rows, heads * head_size]; strides in elements, the last dimension is contiguous.
struct AttentionRows {
  const void* data;
  int64_t stride_batch;
  int64_t stride_row;
};

struct AttentionArgs {
  AttentionRows q;          // [batch, time, heads * head_size]; the queries are the last `time` of the keys
  AttentionRows k, v;       // [batch, keys, heads * head_size]
  const int32_t* segments;  // [batch, keys], contiguous: every key's sequence, negative: padding; null: one a batch row
  DType dtype;              // of all but lse, which is float64 where it is float64, else float32
  int64_t batch, time, keys;
  int heads, head_size;  // head_size at most max_head_size
  int parts;             // into how many tasks a head is split
};

constexpr int attention_block_keys = 128, attention_block_queries = 32;

struct DecodeArgs;  // this and the next two: common/decode.h
struct AttendArgs;
struct DecodeBase;

// One function for each kernel, set by add_NAME(Kernels&) in csrc/cpu/NAME.cpp; null where no instruction set of the
// processor has it. add_NAME is [[gnu::cold]], because GCC would otherwise inline less into the kernels beside it.
struct Kernels {
  const char* isa;  // the instruction set

  // gates = softmax(logits) over the top_k largest; u[t, n*rank + j] = scaling * gates[t, n] * h[t, n*rank + j].
  void (*gate_forward)(const GateArgs&, void* u, void* gates, int threads);

  // From du = d(loss)/du and dgates (may be null) to dprojected [tokens, experts * rank + experts], contiguous; u is
  // recomputed for the gradient of B.
  void (*gate_backward)(const GateArgs&, const void* du, const void* dgates, void* u, void* dprojected, int threads);

  // o = softmax(q @ k.T / sqrt(head_size)) @ v over the keys of the query's segment up to its own, lse [batch, heads,
  // time] the logarithm of the softmax's sum; o = 0 and lse = -inf for padding. The workspace holds `threads` panels of
  // 2 * head_size * (keys rounded up to attention_block_keys) values in lse's dtype. Outputs are contiguous.
  void (*attention_forward)(const AttentionArgs&, void* o, void* lse, void* workspace, int threads);
  // Workspace: threads + (parts == 1 ? threads : batch * heads * parts) panels.
  void (*attention_backward)(const AttentionArgs&, const AttentionRows& o, const AttentionRows& d_o, const void* lse,
                             void* dq, void* dk, void* dv, void* workspace, int threads);

  // out = keep ? x / (1 - p) : 0; element [row, col] is kept by Philox4x32-10, see dropout.cpp. out may be x.
  void (*dropout)(const void* x, void* out, DType, int64_t rows, int64_t cols, double p, uint64_t seed, int threads);

  // float32 products with one small dimension.
  // project: out[tokens, n] = x[tokens, k] @ m[k, n]; m[i, j] lies at i * stride_i + j * stride_j. Either k or n is
  // small. m is packed into `panel`, k * n_padded floats; n_padded: n rounded up to skinny_padding.
  void (*project)(const float* x, int64_t ld_x, const float* m, int64_t stride_i, int64_t stride_j, float* panel,
                  float* out, int64_t ld_out, int64_t tokens, int64_t k, int64_t n, int threads);
  // reduce: out[r, n] = u[tokens, r].T @ y[tokens, n].
  void (*reduce)(const float* u, int64_t ld_u, const float* y, int64_t ld_y, float* out, int64_t tokens, int64_t r,
                 int64_t n, int threads);

  // The same for bfloat16 x, u and y with float32 sums and results, and expand: y[tokens, n] += u[tokens, r] @ panel.
  // The workspace `partial` of reduce holds (threads - 1) * r * n floats. All four are null without AVX512_BF16.
  // The small operand comes in pairs along the summed dimension, [ceil(k / 2), n_padded, 2] bfloat16, which pack_pairs
  // makes from float32 or bfloat16; the u of reduce comes transposed, [r, tokens].
  void (*pack_pairs)(const void* source, DType, int64_t stride_i, int64_t stride_j, void* panel, int64_t k, int64_t n);
  void (*project_bf16)(const void* x, int64_t ld_x, const void* panel, float* out, int64_t ld_out, int64_t tokens,
                       int64_t k, int64_t n, int threads);
  void (*expand_bf16)(const void* u, int64_t ld_u, const void* panel, void* y, int64_t ld_y, int64_t tokens, int64_t r,
                      int64_t n, int threads);
  void (*reduce_bf16)(const void* u_transposed, int64_t ld_u, const void* y, int64_t ld_y, float* out, float* partial,
                      int64_t tokens, int64_t r, int64_t n, int threads);

  // One decoding step, see common/decode.h; `attend` is null but for ALoRA. The workspace holds decode_floats.
  void (*decode)(const DecodeArgs&, const AttendArgs* attend, const DecodeBase&, float* workspace, int threads);
};

constexpr int64_t skinny_padding = 16;  // columns of a packed panel are a multiple of this on every instruction set
}  // namespace gci
