// The largest sizes that the kernels take: arrays of fixed size and error messages are made from these.
// gci_kernels/limits.py has the same for Python, which compares the two when it loads the extension.
#pragma once

#define GCI_LIMITS(LIMIT)                                              \
  LIMIT(max_experts, 256)          /* experts of a LoRAMoE layer */    \
  LIMIT(max_rank, 256)             /* rank of an ALoRA layer */        \
  LIMIT(max_head_size, 64)         /* columns of an attention head */  \
  LIMIT(max_decode_tokens, 16)     /* tokens of a decoding step */     \
  LIMIT(max_decode_columns, 512)   /* rows of [A; router] in a step */ \
  LIMIT(max_decode_head_size, 128) /* columns of a head in a step */

namespace gci {

#define GCI_DEFINE(name, value) constexpr int name = value;
GCI_LIMITS(GCI_DEFINE)
#undef GCI_DEFINE

}  // namespace gci
