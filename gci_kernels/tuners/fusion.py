"""When an adapter may take over its base layer's product, and what all tuners do with the answer."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gci_kernels.class_swap import parts_of
from gci_kernels.limits import MAX_DECODE_TOKENS
from gci_kernels.ops.decode import plan
from gci_kernels.ops.transforms import transformed
from gci_kernels.tuners import hooks
from gci_kernels.tuners.frozen import UpcastLinear


def obstacle(module: nn.Module, x: Tensor | None = None) -> str | None:
    """Why `module`'s product must stay its own call, or None where a kernel may read its weight and bias instead.

    `x`: what would be multiplied; None: something on the device of the weight.
    """
    if type(module) is not nn.Linear and not isinstance(module, UpcastLinear):
        return f"{type(module).__name__} is not torch.nn.Linear"
    has = module.__dict__
    if "forward" in has and (reason := hooks.obstacle(module, x)) is not None:
        return reason
    # What nn.Module.__call__ would run around forward; a fused layer reads the weight and calls neither.
    if has["_forward_hooks"] or has["_forward_pre_hooks"] or has["_backward_hooks"] or has["_backward_pre_hooks"]:
        return "it has hooks"
    kind = type(has["_parameters"].get("weight"))
    if kind is not nn.Parameter and (kind := type(module.weight)) not in (nn.Parameter, Tensor):
        return f"its weight is a {kind.__name__}"
    return None


def operands(module: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias, looked up without the cost of nn.Module.__getattr__."""
    # Looked up as items: the dictionary may be one that gathers a sharded parameter when it is (DeepSpeed's ZeRO-3).
    parameters = module._parameters
    try:
        return parameters["weight"], parameters["bias"]
    except KeyError:  # a replica of torch.nn.DataParallel, whose parameters are plain attributes
        return module.weight, module.bias


def is_plain(module: nn.Module) -> bool:
    """Whether `module` is a torch.nn.Linear as it was made, quickly; where not, :func:`obstacle` knows more."""
    has = module.__dict__
    return (
        type(module) is nn.Linear and "forward" not in has and type(has["_parameters"].get("weight")) is nn.Parameter
        and not (has["_forward_hooks"] or has["_forward_pre_hooks"] or has["_backward_hooks"])
        and not has["_backward_pre_hooks"]
    )  # fmt: skip


def base_operands(base: nn.Module, x: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(weight, bias, None) where a kernel may read them and compute the base product, else (None, None, base(x))."""
    if is_plain(base):
        parameters = base._parameters
        return parameters["weight"], parameters["bias"], None
    if obstacle(base, x) is None:
        return *operands(base), None
    return None, None, product(base, x)


def shared_operands(base: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias where a kernel may read them and compute the base product, else None. Nothing is computed."""
    return operands(base) if is_plain(base) or obstacle(base) is None else None


def takes_steps(impl: str, x: Tensor) -> bool:
    """Whether a layer that gives its op `impl` may take a decoding step for x: a few tokens, and no gradients."""
    # A subclass (a fake tensor, one in shards) need not have an address for a kernel.
    if torch.is_grad_enabled() or type(x) is not Tensor or not 0 < x.numel() <= MAX_DECODE_TOKENS * x.shape[-1]:
        return False
    device = x.device.type
    if impl != "auto" and not (impl == "native" and device == "cpu"):
        return False
    if (
        x.dtype not in plan.BUILT.get(device, ())
        or device != "cpu"
        and not plan.has_kernels(x.dtype, device, device=x.device)
    ):
        return False
    return not torch.is_autocast_enabled(device) and not transformed()


def product(base: nn.Module, x: Tensor) -> Tensor:
    """base(x), for an update to be added to.

    Raises:
        TypeError: that is no tensor, as of routers that derive from torch.nn.Linear.
    """
    y = base(x)
    if not isinstance(y, Tensor):
        raise TypeError(
            f"a {type(base).__name__} returns a {type(y).__name__}, not a tensor, and no adapter can add to that: "
            "leave it out by exclude_modules"
        )
    return y


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear layer: torch's, transformers' Conv1D, or a quantised one that PEFT adapts too."""
    # Those of HQQ, GPTQ, AWQ and AQLM derive from nn.Module alone; the attribute with their codes identifies them.
    return has_rows(module) or (
        hasattr(module, "in_features") and (hasattr(module, "qweight") or hasattr(module, "codes"))
    )


def has_rows(module: nn.Module) -> bool:
    """Whether `module` is a linear layer whose weight PEFT's dequantize_module_weight knows to give back."""
    return isinstance(module, (nn.Linear, Conv1D)) or hasattr(module, "W_q")


def computes_otherwise(module: nn.Module) -> bool:
    """Whether `module` derives from torch.nn.Linear and does not compute x @ W.T + b, which one input shows.

    bitsandbytes' layers, whose weight is dequantised, count as computing it; a weight on the meta device does not.
    """
    kind: Any = type(module)
    plain = parts_of(kind)[0]
    own_forward = issubclass(plain, nn.Linear) and plain.forward is not nn.Linear.forward
    if not own_forward or plain.__module__.startswith("bitsandbytes."):
        return False
    weight, bias = operands(module)
    if weight.is_meta or weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return True
    # In float32, where what such layers round shows; the copy shares all but the parameters.
    weight, bias, twin = weight.float(), None if bias is None else bias.float(), copy.copy(module)
    vars(twin)["_parameters"] = {**module._parameters, "weight": weight, "bias": bias}
    with torch.no_grad():
        x = torch.arange(weight.shape[1], device=weight.device).sin().unsqueeze(0)
        wanted, y = torch.nn.functional.linear(x, weight, bias), kind.forward(twin, x)
        if not isinstance(y, Tensor) or y.shape != wanted.shape:
            return True
        return not bool((y - wanted).norm() <= 1e-5 * wanted.norm())
