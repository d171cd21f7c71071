"""The largest sizes that the kernels take; checks and their messages are made from these.

csrc/common/limits.h has the same for C++. An extension that was built with other limits is not loaded.
"""

MAX_EXPERTS = 256  # experts of a LoRAMoE layer
MAX_RANK = 256  # rank of an ALoRA layer
MAX_HEAD_SIZE = 64  # columns of an attention head
MAX_DECODE_TOKENS = 16  # tokens of a decoding step, all sequences together
MAX_DECODE_COLUMNS = 512  # rows of [A; router] in a decoding step
MAX_DECODE_HEAD_SIZE = 128  # columns of an attention head in a decoding step
