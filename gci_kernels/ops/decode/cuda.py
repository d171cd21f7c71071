"""A decoding step in CUDA C++ (csrc/cuda), in two launches behind the base product's: project or attend, then expand.

Sizes and alignment are checked by the launch (ValueError), shapes, dtypes and devices by the caller. All of it may be
captured in a CUDA graph, after one run outside it; groups, rows and addresses stay as they were captured, and `past` is
read at every replay.
"""

import weakref
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gci_kernels.native import cuda_extension as extension
from gci_kernels.ops.decode.group import Group, native_step


class Step:
    """A step for the adapters of some rows, made once and called for as long as their tensors are the same ones.

    The caller sees to it that x and y are on the GPU of the adapters and of the step's dtype, that their last dimension
    has no gaps, is as long as the adapters say, and that they have all of `rows`; and that the adapters' tensors live
    and stay where they are: only their addresses are kept.

    Args:
        groups: the adapters; tokens of none are left alone. All of them attend or none does.
        rows: which row of x, y and the cache each token is; at most 16, none twice.
        dtype: of x and y; float32, bfloat16 or float16.
        weight, bias: [out, in] and [out] or None; weight None: y comes with the base product.
    """

    def __init__(
        self, groups: Sequence[Group], rows: Sequence[int], dtype: torch.dtype, weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:  # fmt: skip
        first, module = groups[0], extension()
        self.native = native_step(module, groups, rows, dtype)
        self.device, self.index = first.A.device, index_of(first.A)
        self.columns = max(group.columns for group in groups)
        self.splits = 1 if first.qkv is not None else module.decode_splits(len(rows), self.columns, first.A.shape[1])
        self.sums = (self.splits, len(rows), self.columns)
        self._base = tuple(None if t is None else weakref.ref(t) for t in (weight, bias))
        self._project, self._attend, self._expand = module.cuda_project, module.cuda_attend, module.cuda_expand

    def run(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """y [..., out] for x [..., in], both in the step's dtype; y without gaps, None where the step has a weight."""
        x, y = self._operands(x, y)
        self.add(y.view(-1, y.shape[-1]), x)
        return y

    def attend(self, x: Tensor, y: Tensor | None, kv: Tensor, past: Tensor, segments: Tensor | None) -> Tensor:
        """The same with attention, one new token of each sequence; kv, past and segments: :func:`attend`."""
        x, y = self._operands(x, y)
        self.add_attended(y.view(-1, y.shape[-1]), x, kv, past, segments)
        return y

    def _operands(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """x as [tokens, in], and y, made with the base product where there is none."""
        if y is None:
            weight, bias = (None if t is None else t() for t in self._base)
            if weight is None:
                raise ValueError("y must be given: the step was made without a weight")
            y = F.linear(x, weight, bias)
        x = x.view(-1, x.shape[-1]) if x.is_contiguous() else x.reshape(-1, x.shape[-1]).contiguous()
        return x, y

    def add(self, y: Tensor, x: Tensor) -> None:
        """y[rows] += scaling * mix(x[rows] @ A.T) @ B.T in place, each value rounded once; [any, out] and [any, in]."""
        if not is_current(self.index):
            with torch.cuda.device(self.index):
                return self.add(y, x)
        expand(self, y, project(self, x))

    def add_attended(self, y: Tensor, x: Tensor, kv: Tensor, past: Tensor, segments: Tensor | None = None) -> None:
        """ALoRA's y[rows] += scaling * u @ B.T: a row is the new token of a sequence; arguments: :func:`attend`."""
        if not is_current(self.index):
            with torch.cuda.device(self.index):
                return self.add_attended(y, x, kv, past, segments)
        expand(self, y, attend(self, x, kv, past, segments))


def index_of(t: Tensor) -> int:
    """The number of the GPU that a tensor is on."""
    if not t.is_cuda:
        raise ValueError(f"the CUDA kernels take CUDA tensors, got one on {t.device}")
    return t.get_device()


def is_current(index: int) -> bool:
    """Whether kernels are launched on this GPU."""
    return torch.cuda.current_device() == index


def stream_of(index: int) -> int:
    """The address of the current stream; torch.cuda.current_stream takes longer than a launch's other arguments."""
    return torch._C._cuda_getCurrentRawStream(index)


# The two halves, on the current GPU. expand must directly follow, on its stream, what made its `partial`, for it starts
# while that runs.


def project(step: Step, x: Tensor) -> Tensor:
    """float32 sums [splits, tokens, columns], to be added up by expand: x[rows] @ [A; router].T of each group.

    Behind a group's own columns, and at tokens of no group, nothing is written.
    """
    partial = torch.empty(step.sums, dtype=torch.float32, device=step.device)
    step._project(
        step.native, x.data_ptr(), x.stride(0), partial.data_ptr(), step.splits, step.columns, stream_of(step.index)
    )
    return partial


def attend(step: Step, x: Tensor, kv: Tensor, past: Tensor, segments: Tensor | None = None) -> Tensor:
    """u, float32 [1, tokens, columns]: what each group's new tokens see, and what expand takes as `partial`.

    Args:
        x: [sequences, in].
        kv: [sequences, capacity, at least 2 * rank] in the dtype of x, a token's keys before its values, the last
            dimension without gaps; the new token's are written behind the first `past`.
        past: int32 on the GPU, one number. u is NaN where it is not below the capacity, and nothing is written.
        segments: int32 [sequences, above past], rows without gaps; None: one sequence a row.
    """
    partial = torch.empty(step.sums, dtype=torch.float32, device=step.device)
    stride_kv, ld_kv, _ = kv.stride()
    step._attend(
        step.native, x.data_ptr(), x.stride(0), (kv.data_ptr(), stride_kv, ld_kv, kv.shape[1]), past.data_ptr(),
        (0, 0) if segments is None else (segments.data_ptr(), segments.stride(0)),
        partial.data_ptr(), step.columns, stream_of(step.index),
    )  # fmt: skip
    return partial


def expand(step: Step, y: Tensor, partial: Tensor) -> None:
    """y[rows] += scaling * mix(partial.sum(0)) @ B.T in place."""
    step._expand(
        step.native, y.data_ptr(), y.stride(0), partial.data_ptr(), step.splits, step.columns, stream_of(step.index)
    )
