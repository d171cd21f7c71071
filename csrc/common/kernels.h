// The table of CPU kernels: dispatch.cpp fills one for every instruction set (namespace GCI_ISA) and chooses.
//
// Conventions: row-major tensors given as pointer and leading dimension (elements between rows); no allocation inside,
// workspaces come from the caller; `threads` is the team size; results do not depend on scheduling.
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

// [batch, rows, heads * head_size], elements between batch rows and between rows; the last dimension has no gaps.
struct AttentionRows {
  const void* data;
  int64_t stride_batch;
  int64_t stride_row;
};

struct AttentionArgs {
  AttentionRows q;          // [batch, time, heads * head_size]; the queries are the last `time` of the keys
  AttentionRows k, v;       // [batch, keys, heads * head_size]
  const int32_t* segments;  // [batch, keys], no gaps: the sequence of every key, negative for padding; null: one a row
  DType dtype;              // of everything but lse, which is float64 where it is float64, else float32
  int64_t batch, time, keys;
  int heads, head_size;  // head_size at most 64
  int parts;             // into how many tasks a head is split
};

constexpr int attention_block_keys = 128;

struct DecodeArgs;  // these three: common/decode.h
struct AttendArgs;
struct DecodeBase;

struct Kernels {
  const char* isa;

  // gates = softmax(logits) over the top_k largest; u[t, n*rank + j] = scaling * gates[t, n] * h[t, n*rank + j].
  void (*gate_forward)(const GateArgs&, void* u, void* gates, int threads);

  // From du = d(loss)/du and dgates (may be null) to dprojected [tokens, experts * rank + experts], contiguous; u is
  // computed again on the way, for the gradient of B.
  void (*gate_backward)(const GateArgs&, const void* du, const void* dgates, void* u, void* dprojected, int threads);

  // o = softmax(q @ k.T / sqrt(head_size)) @ v over the keys of the query's segment up to its own, lse [batch, heads,
  // time] the logarithm of the softmax's sum; o = 0 and lse = -inf for padding. The workspace holds `threads` panels of
  // 2 * head_size * (keys rounded up to attention_block_keys) values in lse's dtype. Outputs have no gaps.
  void (*attention_forward)(const AttentionArgs&, void* o, void* lse, void* workspace, int threads);
  // Workspace: threads + (parts == 1 ? threads : batch * heads * parts) panels.
  void (*attention_backward)(const AttentionArgs&, const AttentionRows& o, const AttentionRows& d_o, const void* lse,
                             void* dq, void* dk, void* dv, void* workspace, int threads);

  // out = keep ? x / (1 - p) : 0; element [row, col] is kept by Philox4x32-10, see dropout.cpp. out may be x.
  void (*dropout)(const void* x, void* out, DType, int64_t rows, int64_t cols, double p, uint64_t seed, int threads);

  // float32 products with one small side.
  // project: out[tokens, n] = x[tokens, k] @ m[k, n], whose elements lie at i * stride_i + j * stride_j. Either k or n
  // is small. It packs m into `panel`, k * n_padded floats; n_padded: n rounded up to skinny_padding.
  void (*project)(const float* x, int64_t ld_x, const float* m, int64_t stride_i, int64_t stride_j, float* panel,
                  float* out, int64_t ld_out, int64_t tokens, int64_t k, int64_t n, int threads);
  // reduce: out[r, n] = u[tokens, r].T @ y[tokens, n].
  void (*reduce)(const float* u, int64_t ld_u, const float* y, int64_t ld_y, float* out, int64_t tokens, int64_t r,
                 int64_t n, int threads);

  // The same for bfloat16 x, u and y with float32 sums and results, and expand: y[tokens, n] += u[tokens, r] @ panel.
  // reduce's partial holds (threads - 1) * r * n floats.
  // Null without AVX512_BF16, pack_pairs too. The small operand comes in pairs along the summed dimension,
  // [ceil(k / 2), n_padded, 2] bfloat16: pack_pairs, from float32 or bfloat16; u of reduce transposed, [r, tokens].
  void (*pack_pairs)(const void* source, DType, int64_t stride_i, int64_t stride_j, void* panel, int64_t k, int64_t n);
  void (*project_bf16)(const void* x, int64_t ld_x, const void* panel, float* out, int64_t ld_out, int64_t tokens,
                       int64_t k, int64_t n, int threads);
  void (*expand_bf16)(const void* u, int64_t ld_u, const void* panel, void* y, int64_t ld_y, int64_t tokens, int64_t r,
                      int64_t n, int threads);
  void (*reduce_bf16)(const void* u_turned, int64_t ld_u, const void* y, int64_t ld_y, float* out, float* partial,
                      int64_t tokens, int64_t r, int64_t n, int threads);

  // One decoding step, see common/decode.h; `attend` is null but for ALoRA. The workspace holds decode_floats.
  void (*decode)(const DecodeArgs&, const AttendArgs* attend, const DecodeBase&, float* workspace, int threads);
};

constexpr int64_t skinny_padding = 16;  // columns of a packed panel are a multiple of this on every instruction set

const Kernels& kernels();  // the best table this processor runs, or the one named by GCI_CPU_ISA

}  // namespace gci
