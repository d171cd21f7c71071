"""The mixers: what stands between `project` and `expand`. An adapter of this family is a mixer and nothing else.

A mixer is a module with

    JOINS                                    whether its weights are rows of `project` beside A, as a router's are
    forward(projected, inputs, call)         -> u, kept, shown
    again(inputs, kept, call)                -> u once more, in backward
    backward(du, dshown, inputs, kept, call) -> dprojected, dweights, u
    shapes(inputs, call)                     -> shape and dtype of the tensors in kept, and of shown

u [tokens, R] goes into `expand` with the scaling in it. `projected` [tokens, R, and its weights' rows where it joins]
and du are in the dtype that `project` leaves its sums in; u and dprojected are in x's. `shown` is for the caller: the
gates, or what generation caches. Where something is absent there is an empty tensor; the gradient of weights that join
is None, for it comes from dprojected.
"""

import functools
import importlib
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """One call of a mixer: what it is beside tensors."""

    settings: list[int]  # the mixer's own numbers
    scaling: float
    lead: tuple[int, ...]  # x's shape without its last dimension; its product is `tokens`
    rank: int  # of A
    dtype: torch.dtype  # x's
    sum_dtype: torch.dtype  # `projected`'s
    impl: str


class Inputs(NamedTuple):
    """The mixer's tensors: parameters, and what the sequence is."""

    weights: Tensor | None
    segments: Tensor | None
    past: Tensor | None


class Kept(NamedTuple):
    """What backward needs of a mixer's forward, beside its inputs."""

    projected: Tensor
    mixed: Tensor
    stats: Tensor


@functools.cache
def mixer(name: str) -> ModuleType:
    """The module of that name beside this one."""
    return importlib.import_module(f"gci_kernels.ops.bottleneck.mixers.{name}")
