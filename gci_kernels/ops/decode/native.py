"""The step in C++ (csrc/cpu/decode.cpp) for CPU tensors."""

import torch
from torch import Tensor

from gci_kernels.native import DTYPE_CODES, extension


class Step:
    """A step of one adapter for a number of tokens; what differs from call to call is x and y.

    Args:
        A [rank, in], router [experts, in] or None, B [out, rank]: in one dtype, without gaps; they have to live and
            stay where they are as long as this is used.
    """

    def __init__(
        self, A: Tensor, router: Tensor | None, B: Tensor, scaling: float, top_k: int, tokens: int, dtype: torch.dtype
    ) -> None:
        experts = 0 if router is None else router.shape[0]
        self.in_features, self.out_features = A.shape[1], B.shape[0]
        # What the kernel keeps between its halves: x widened, and the projected values.
        self.rank, self.tokens = A.shape[0], tokens
        self.workspace = tokens * (self.in_features + A.shape[0] + experts)
        addresses = (A.data_ptr(), 0 if router is None else router.data_ptr(), B.data_ptr())
        group = (*addresses, A.shape[0] // max(experts, 1), experts, top_k, scaling, 0, tokens)
        self.run = extension().DecodeStep(
            DTYPE_CODES[dtype], DTYPE_CODES[A.dtype], self.in_features, self.out_features, list(range(tokens)), [group]
        )

    def __call__(self, y: Tensor, x: Tensor) -> None:
        """y [tokens, out] += the update of x [tokens, in], both in the step's dtype and without gaps."""
        workspace = torch.empty(self.workspace, dtype=torch.float32)
        self.run(
            x.data_ptr(), self.in_features, y.data_ptr(), self.out_features, workspace.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip

    def attend(
        self, y: Tensor, x: Tensor, qkv: Tensor, kv: Tensor, past: int, segments: Tensor | None,
        *, num_heads: int, residual: bool,
    ) -> None:  # fmt: skip
        """ALoRA's update of one new token of each sequence, whose k and v are written into the cache.

        Args:
            y [batch, out], x [batch, in]: as above.
            qkv: [3 * rank, rank] in A's dtype, without gaps.
            kv: [batch, capacity, 2 * rank] in the step's dtype, rows without gaps; filled up to `past` < capacity.
            segments: [batch, past + 1] int32, rows without gaps, or None: all keys are seen.
        """
        floats = self.tokens * (self.in_features + 4 * self.rank + past + 1)
        workspace, u = (torch.empty(n, dtype=torch.float32) for n in (floats, self.tokens * self.rank))
        self.run.attend(
            x.data_ptr(), self.in_features, y.data_ptr(), self.out_features, qkv.data_ptr(), num_heads, residual,
            (kv.data_ptr(), kv.stride(0), kv.shape[1]), past,
            (0, 0) if segments is None else (segments.data_ptr(), segments.stride(0)),
            u.data_ptr(), workspace.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
