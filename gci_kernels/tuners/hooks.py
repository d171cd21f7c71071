"""accelerate's hooks, for layers that read the tensors of other modules where those modules are not called.

accelerate (cpu_offload, disk_offload, dispatch_model, device_map) replaces the forward of a module's instance. Before
that runs, its AlignDevicesHook brings the module's tensors to the execution device and moves the input there; behind
it, it puts the tensors that it offloads back onto the meta device. A container of parameters has such a hook too, but
no forward that anybody calls.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook
from torch import Tensor, nn

#: Where a module keeps its hook.
HOOK = "_hf_hook"


def obstacle(module: nn.Module, x: Tensor | None = None) -> str | None:
    """What the forward on an instance does beside that of its class, or None where it is nothing.

    Args:
        module: a layer with a weight, and with `forward` in its __dict__.
        x: what it would be called with; None: something on the device of its weight.
    """
    forward = vars(module)["forward"]
    if is_own(module, forward):  # what accelerate leaves where it takes its hook away
        return None
    hook, old = vars(module).get(HOOK), vars(module).get("_old_forward")
    if torch.compiler.is_compiling() or not (hook is not None and _is_of_accelerate(forward) and is_own(module, old)):
        return "its forward is replaced on the instance"
    for each in _each(hook):
        if type(each) not in (ModelHook, AlignDevicesHook) or each.no_grad:
            return f"a {type(each).__name__} of accelerate runs around its forward"
        if type(each) is ModelHook:
            continue
        if each.offload:
            return "its weight is offloaded, and a hook of accelerate brings it for a call"
        weight: Any = module.weight
        if not _is_on(weight.device, each.execution_device) or (x is not None and x.device != weight.device):
            return "a hook of accelerate moves its input"
    return None


def is_own(module: nn.Module, forward: object) -> bool:
    """Whether `forward` is that of the module's class, bound to the module."""
    return getattr(forward, "__func__", None) is type(module).forward and getattr(forward, "__self__", None) is module


def _is_of_accelerate(forward: object) -> bool:
    return isinstance(forward, functools.partial) and forward.func.__module__ == ModelHook.__module__


def _each(hook: ModelHook) -> Iterator[Any]:
    if isinstance(hook, SequentialHook):
        for part in hook.hooks:
            yield from _each(part)
    else:
        yield hook


def _is_on(device: torch.device, wanted: int | str | torch.device | None) -> bool:
    if wanted is None:
        return True
    wanted = torch.device(wanted)
    return device.type == wanted.type and wanted.index in (None, device.index)


def onload(container: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A tensor of a container that has a hook, as a call of the container would find it.

    The tensor alone is brought, and not those of other adapters beside it. What the container holds stays as it is.
    """
    hook = vars(container)[HOOK]
    alone = nn.Module()
    tensors = alone._parameters if isinstance(tensor, nn.Parameter) else alone._buffers
    tensors[name] = tensor  # type: ignore[assignment]
    hook.pre_forward(alone)
    found = tensors[name]
    hook.post_forward(alone, None)  # forgets the tensor, which lives on here
    return found  # type: ignore[return-value]


@contextlib.contextmanager
def onloaded(module: nn.Module) -> Iterator[None]:
    """Meanwhile the tensors of an offloaded module are where it computes. What is written to them is lost."""
    if not is_offloaded(module):
        yield
        return
    hook = vars(module)[HOOK]
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def is_offloaded(module: nn.Module) -> bool:
    """Whether the module's own tensors are on the meta device until a hook brings them."""
    if HOOK not in vars(module):
        return False
    return any(t is not None and t.is_meta for t in (*module._parameters.values(), *module._buffers.values()))


def device_of(module: nn.Module, present: torch.device) -> torch.device:
    """Where the module computes; `present`: where its weight is now."""
    if present.type != "meta" or HOOK not in vars(module):
        return present
    devices = [each.execution_device for each in _each(vars(module)[HOOK]) if isinstance(each, AlignDevicesHook)]
    return next((torch.device(device) for device in devices if device is not None), present)
