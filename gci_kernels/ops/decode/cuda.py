"""A decoding step in CUDA C++ (csrc/cuda), in two launches behind the base product's: project or attend, then expand.

Thin: shapes, dtypes and devices are checked by the caller, sizes and alignment by the launch (ValueError). All of it
may be captured in a CUDA graph, after one run outside it; groups, rows and addresses stay as they were captured, and
`past` is read at every replay. expand must directly follow, on its stream, what wrote its `partial`: it starts early.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gci_kernels.native import CUDA_DTYPE_CODES
from gci_kernels.native import cuda_extension as extension


@dataclass(frozen=True)
class Group:
    """The adapter of the tokens rows[first] to rows[first + count - 1]; its tensors on the GPU and without gaps.

    Attributes:
        A: [rank * max(experts, 1), in], in the dtype of x or float32, as are router and B.
        B: [out, rank * max(experts, 1)].
        router: [experts, in], or None for an adapter without gates.
        top_k: how many gates count; None: all.
    """

    A: Tensor
    B: Tensor
    scaling: float
    first: int
    count: int
    router: Tensor | None = None
    top_k: int | None = None

    @property
    def experts(self) -> int:
        return 0 if self.router is None else self.router.shape[0]

    @property
    def columns(self) -> int:
        return self.A.shape[0] + self.experts

    def as_tuple(self) -> tuple:
        """In the order of DecodeGroup in csrc/common/decode.h."""
        experts = self.experts
        return (
            self.A.data_ptr(), 0 if self.router is None else self.router.data_ptr(), self.B.data_ptr(),
            self.A.shape[0] // max(experts, 1), experts, self.top_k or experts, self.scaling, self.first, self.count,
        )  # fmt: skip


class Step:
    pass


def current(t: Tensor) -> torch.cuda.device:
    """Makes the tensor's GPU the current one, on which kernels are launched."""
    if not t.is_cuda:
        raise ValueError(f"the CUDA kernels take CUDA tensors, got one on {t.device}")
    return torch.cuda.device(t.device)


def stream_of(t: Tensor) -> int:
    return torch.cuda.current_stream(t.device).cuda_stream


def project(x: Tensor, groups: Sequence[Group], rows: Sequence[int]) -> Tensor:
    """float32 sums [splits, len(rows), columns], to be added up by expand: x[rows] @ [A; router].T of each group.

    x is [any, in], float32, bfloat16 or float16, its last dimension without gaps. Behind a group's own columns, and at
    tokens of no group, nothing is written.
    """
    columns = max(group.columns for group in groups)
    splits = extension().decode_splits(len(rows), columns, x.shape[1])
    partial = torch.empty(splits, len(rows), columns, dtype=torch.float32, device=x.device)
    with current(x):
        extension().decode_project(
            _dtypes(x, groups[0].A), (x.data_ptr(), x.stride(0), x.shape[1]), list(rows),
            [group.as_tuple() for group in groups], partial.data_ptr(), splits, columns, stream_of(x),
        )  # fmt: skip
    return partial


def expand(partial: Tensor, y: Tensor, groups: Sequence[Group], rows: Sequence[int]) -> None:
    """y[rows] += scaling * mix(partial.sum(0)) @ B.T in place, each value rounded once; y is [any, out]."""
    splits, _, columns = partial.shape
    with current(y):
        extension().decode_expand(
            _dtypes(y, groups[0].B), (y.data_ptr(), y.stride(0), y.shape[1]), list(rows),
            [group.as_tuple() for group in groups], partial.data_ptr(), splits, columns, stream_of(y),
        )  # fmt: skip


def attend(
    x: Tensor, A: Tensor, qkv: Tensor, num_heads: int, kv: Tensor, past: Tensor, segments: Tensor | None = None,
    residual: bool = False,
) -> Tensor:  # fmt: skip
    """u, float32 [1, batch, rank]: one new token of each sequence attends; what expand takes as `partial`.

    Args:
        x: [batch, in].
        A, qkv: [rank, in] and [3 * rank, rank], in the dtype of x or float32.
        kv: [batch, capacity, 2 * rank] in the dtype of x, keys and values side by side, the last two dimensions without
            gaps; the new token's are written behind the first `past`.
        past: int32 on the GPU, one number. u is NaN where it is not below the capacity, and nothing is written.
        segments: int32 [batch, above past]; None: one sequence a row.
        residual: whether x @ A.T is added.
    """
    u = torch.empty(1, x.shape[0], A.shape[0], dtype=torch.float32, device=x.device)
    with current(x):
        extension().decode_attend(
            _dtypes(x, A), (x.data_ptr(), x.stride(0), x.shape[1]), x.shape[0], A.data_ptr(), qkv.data_ptr(),
            A.shape[0], num_heads, residual, (kv.data_ptr(), kv.stride(0), kv.shape[1]), past.data_ptr(),
            (0, 0) if segments is None else (segments.data_ptr(), segments.stride(0)), u.data_ptr(), stream_of(x),
        )  # fmt: skip
    return u


def _dtypes(x: Tensor, adapter: Tensor) -> tuple[int, int]:
    return CUDA_DTYPE_CODES[x.dtype], CUDA_DTYPE_CODES[adapter.dtype]
