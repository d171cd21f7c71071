"""accelerate's hooks, for layers that read the tensors of other modules without calling those modules.

accelerate (cpu_offload, disk_offload, dispatch_model, device_map) replaces the forward of a module's instance. Before
that runs, its AlignDevicesHook brings the module's tensors to the execution device and moves the input there; after it,
the tensors that it offloads go back to the meta device. A container of parameters has such a hook too, but no forward
that anybody calls.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook
from torch import Tensor, nn

#: The attribute in which accelerate keeps a module's hook.
HOOK = "_hf_hook"


def obstacle(module: nn.Module, x: Tensor | None = None) -> str | None:
    """What the forward that is set on an instance does beside its class's, or None where that is nothing.

    Args:
        module: a layer with a weight, and with `forward` in its __dict__.
        x: its input [..., in]; None: one on the device of its weight.
    """
    forward = vars(module)["forward"]
    if is_class_forward(module, forward):  # what accelerate leaves where it takes its hook away
        return None
    hook, old = vars(module).get(HOOK), vars(module).get("_old_forward")
    accelerate = isinstance(forward, functools.partial) and forward.func.__module__ == ModelHook.__module__
    if torch.compiler.is_compiling() or hook is None or not accelerate or not is_class_forward(module, old):
        return "its forward is replaced on the instance"
    for each in _single_hooks(hook):
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


def devices(module: nn.Module, x: Tensor) -> tuple[torch.device, torch.device] | None:
    """Where the module's hook moves x before its forward, and the output after it; None where it moves neither."""
    if HOOK not in vars(module):
        return None
    there, back = x.device, None
    for hook in _single_hooks(vars(module)[HOOK]):
        if type(hook) is not AlignDevicesHook:
            continue
        if hook.io_same_device:
            back = there
        if not _is_on(there, hook.execution_device):
            there = torch.device(hook.execution_device)
    return None if there == x.device else (there, there if back is None else back)


def is_class_forward(module: nn.Module, forward: object) -> bool:
    """Whether `forward` is the method of the module's class, bound to the module."""
    return getattr(forward, "__func__", None) is type(module).forward and getattr(forward, "__self__", None) is module


def _single_hooks(hook: ModelHook) -> Iterator[Any]:
    """The hooks that a sequence of hooks consists of."""
    if isinstance(hook, SequentialHook):
        for part in hook.hooks:
            yield from _single_hooks(part)
    else:
        yield hook


def _is_on(device: torch.device, expected: int | str | torch.device | None) -> bool:
    if expected is None:
        return True
    expected = torch.device(expected)
    return device.type == expected.type and expected.index in (None, device.index)


def onload(container: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A tensor of a container that has a hook, brought to the device where the container's hook would bring it.

    Only this tensor is copied, and not those of other adapters in the container, which itself stays as it is.

    Args:
        name: of the tensor in the container.
        tensor: a parameter or buffer of the container, on the meta device.
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
    """While this context is active, an offloaded module's tensors are where it computes; writes to them are lost."""
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
    """The device on which the module computes; `present`: the one where its weight is now."""
    if present.type != "meta" or HOOK not in vars(module):
        return present
    devices = (getattr(each, "execution_device", None) for each in _single_hooks(vars(module)[HOOK]))
    return next((torch.device(device) for device in devices if device is not None), present)
