"""The public linear layers with trained rows, and the checks of their arguments."""

import torch
from torch import Tensor

from gci_kernels.impl import check_impl
from gci_kernels.ops.arguments import autocast_dtype, check_tensor, check_x, without_autocast
from gci_kernels.ops.row_linear import reference
from gci_kernels.ops.row_linear.autograd import row_linear
from gci_kernels.ops.row_linear.merged import MergedRows, merge_rows
from gci_kernels.ops.row_linear.plan import choose_form
from gci_kernels.ops.transforms import transformed


def loki_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, active_weight: Tensor, positions: Tensor,
    active_bias: Tensor | None = None, *, merged: MergedRows | None = None, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """A linear layer in which some rows of the weight are trained: y = x @ W'.T + b' (LoKI, arXiv 2505.22120).

    W' and b' are W and b with the rows at `positions` replaced by the active ones. y takes one product, dX one, and the
    active rows' gradient one, with their columns of dY. Differentiable in x, active_weight and active_bias; W and b are
    frozen. Saved for backward: x alone. Second derivatives are computed from the formula; torch.jit.trace,
    torch.export, torch.func and forward-mode differentiation run the formula too, whatever `impl` says. Under autocast
    the operands are cast as torch.nn.functional.linear casts them. Deterministic for a given number of threads.

    Args:
        x: [..., in], any floating dtype and device. Rows that are not contiguous are copied once.
        weight: [out, in] in x's dtype and on its device, without a gradient.
        bias: [out] in x's dtype, without a gradient, or None.
        active_weight: [k, in], any floating dtype; used in x's.
        positions: [k] int64 on x's device, k >= 1: the rows of weight that the active ones replace, in any order.
            :func:`check_positions` checks that they are distinct and in range. This function does so on a CPU only:
            on a GPU it would have to wait for the values.
        active_bias: [k], any floating dtype; used in x's; None: b is used as it is. It needs a bias.
        merged: a MergedRows that the caller keeps for this layer, always the same one: W' is then not made in each
            call. Not used by "reference" and "triton", nor under torch.compile.
        impl: "auto", "reference", "aten", "upcast" or "triton"; an explicit one that cannot run raises, as "native"
            always does: on a CPU these products are the library's.

    Returns:
        [..., out], x's dtype.

    Raises:
        ValueError, TypeError: naming the argument that does not fit, what was given and what is allowed.
    """
    check_impl(impl)
    dtype = autocast_dtype(x)
    x = x if dtype is None else x.to(dtype)
    _check(x, weight, bias, active_weight, positions, active_bias, any_dtype=dtype is not None)
    if positions.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed():
        check_positions(positions, weight.shape[0])
    return adapted_row_linear(x, weight, bias, active_weight, positions, active_bias, merged, impl)


def adapted_row_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, active_weight: Tensor, positions: Tensor,
    active_bias: Tensor | None, merged: MergedRows | None, impl: str,
) -> Tensor:  # fmt: skip
    """The op for layers, whose parameters fit each other; x is checked in full only if a quick comparison fails.

    Args: as in :func:`loki_linear`; the values of `positions` are not checked.
    """
    device, dtype = x.device, x.dtype
    usual = (
        weight.dtype is dtype and x.shape[-1:] == weight.shape[1:] == active_weight.shape[1:]
        and positions.shape == active_weight.shape[:1] and positions.dtype is torch.int64
        and device == weight.device == active_weight.device == positions.device and not weight.requires_grad
        and (bias is None or bias.dtype is dtype and not bias.requires_grad)
    )  # fmt: skip
    if not usual or device.type == "meta" or torch.is_autocast_enabled(device.type) or not x.is_floating_point():
        cast = autocast_dtype(x)
        x = x if cast is None else x.to(cast)
        _check(x, weight, bias, active_weight, positions, active_bias, any_dtype=cast is not None)
        dtype, bias = x.dtype, None if bias is None else bias.to(x.dtype)
    if impl == "reference" or transformed():
        weight = weight.to(dtype)
        return without_autocast(reference.loki_linear)(x, weight, bias, active_weight, positions, active_bias)
    # Calls with gradients make the copy of W', and all later calls use it.
    keep = merged is not None and not torch.compiler.is_compiling() and (
        merged.has(device) or (torch.is_grad_enabled() and (x.requires_grad or active_weight.requires_grad))
    )  # fmt: skip
    form = choose_form(
        impl, tokens=x.numel() // x.shape[-1], share=positions.shape[0] / weight.shape[0], dtype=dtype,
        device_type=device.type, keep=keep, device=device,
    )  # fmt: skip
    if form == "kept" and merged is not None:
        weight = merged.renewed(weight, active_weight, positions, dtype)
    elif weight.dtype is not dtype:
        weight = weight.to(dtype)
    return row_linear(x, weight, bias, active_weight, positions, active_bias, form)


def partitioned_loki_linear(
    x: Tensor, frozen: Tensor, bias: Tensor | None, active_weight: Tensor, positions: Tensor, frozen_positions: Tensor,
    active_bias: Tensor | None, *, merged: MergedRows | None,
) -> Tensor:  # fmt: skip
    """:func:`loki_linear` for a weight stored in two parts, frozen and active rows, as the published layer stores it.

    Args:
        x, active_weight, positions, active_bias: as there.
        merged: as there; None: W' is made in each call, and kept for its backward.
        frozen: [out - k, in], without a gradient.
        bias: [out], without a gradient, or None; with an active_bias, its values at `positions` are not used.
        frozen_positions: [out - k] int64: the rows of the weight that `frozen` holds; with `positions`, every row once.
            Not checked.

    Returns:
        [..., out], x's dtype.

    Raises:
        ValueError, TypeError: x is not a floating point [..., in].
    """
    dtype = autocast_dtype(x) or x.dtype
    x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    check_x(x)
    make_weight = merge_rows if merged is None or torch.compiler.is_compiling() else merged.renewed
    weight = make_weight(frozen, active_weight, positions, dtype, frozen_positions)
    return row_linear(x, weight, bias, active_weight, positions, active_bias, "kept")


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, active_weight: Tensor, positions: Tensor,
    active_bias: Tensor | None, any_dtype: bool,
) -> None:  # fmt: skip
    check_x(x)
    check_tensor("weight", weight, (None, x.shape[-1]), x, same_dtype=not any_dtype)
    check_tensor("active_weight", active_weight, (None, x.shape[-1]), x, same_dtype=False)
    if bias is not None:
        check_tensor("bias", bias, (weight.shape[0],), x, same_dtype=not any_dtype)
    # Under transforms the formula runs, which has all gradients.
    for name, frozen in () if transformed() else (("weight", weight), ("bias", bias)):
        if frozen is not None and frozen.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must be frozen: loki_linear forms no gradient of it; call requires_grad_(False)")
    _check_rows(positions, active_weight, weight)
    if active_bias is not None:
        if bias is None:
            raise ValueError("active_bias must be None where bias is None: there is nothing to replace")
        check_tensor("active_bias", active_bias, (positions.shape[0],), x, same_dtype=False)


def _check_rows(positions: Tensor, active_weight: Tensor, weight: Tensor) -> None:
    if not isinstance(positions, Tensor):
        raise TypeError(f"positions must be a tensor, got {type(positions).__name__}")
    if positions.dtype != torch.int64:
        raise TypeError(f"positions must be int64, got {positions.dtype}")
    if positions.dim() != 1 or positions.shape[0] < 1:
        raise ValueError(f"positions must be [k] with k >= 1, got {list(positions.shape)}")
    if positions.shape[0] != active_weight.shape[0]:
        raise ValueError(
            f"active_weight must be [{positions.shape[0]}, in] like positions, got {list(active_weight.shape)}"
        )
    if positions.device != weight.device:
        raise ValueError(f"positions must be on x's device {weight.device}, got {positions.device}")


def check_positions(positions: Tensor, out: int) -> None:
    """Raise ValueError unless `positions` [k] int64 are distinct rows of a weight of `out` rows; waits for a GPU."""
    ordered = positions.sort().values
    if ordered[0] < 0 or ordered[-1] >= out:
        bad = ordered[0] if ordered[0] < 0 else ordered[-1]
        raise ValueError(f"positions must be rows from 0 to {out - 1}, got {int(bad)}")
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if repeated.numel():
        raise ValueError(f"positions must be distinct, got {int(repeated[0])} more than once")
