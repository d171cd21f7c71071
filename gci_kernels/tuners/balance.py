"""Carries the gates of all LoRAMoE layers to the model's loss: the localized balancing constraint in training."""

import inspect
import threading
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gci_kernels.ops import balance_loss
from gci_kernels.tuners.token_grid import Grid, TokenGrids

NO_TASKS = (
    "balance_weight is set, but this batch has no task_types: the balancing constraint is not in its loss. Give "
    "task_types [batch] with every batch (Trainer drops them unless remove_unused_columns=False), or set "
    "balance_weight=0"
)
UNUSED = (
    "balance_weight is set, but the loss that was differentiated does not hold the balancing constraint: a loss "
    "computed from the logits, as Trainer does with label_smoothing_factor or compute_loss_func, leaves the model's "
    'own out. Add output["balance_loss"] to it'
)


@dataclass
class _LayerGates:
    """What one layer recorded, with the config of its adapter."""

    gates: Tensor  # [batch, time, num_experts]
    mask: Tensor | None  # [batch, time], of the tokens that count; None: all
    config: Any  # LoRAMoEConfig


@dataclass
class _ForwardPass:
    """One forward pass of the model in training with `task_types` in its batch."""

    task_types: Tensor
    grids: dict[str, Grid]
    has_labels: bool
    grad_enabled: bool
    fraction: Tensor | float  # this batch's part of the optimizer step's targets
    check_values: Callable[[], None]
    recorded: list[_LayerGates] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    output: Tensor | None = None  # of the last layer that was recorded

    def total(self) -> Tensor:
        """The sum over layers of weight * balance_loss, a scalar on the first layer's device.

        Computed after the layers: under gradient checkpointing their forward runs again without a pass, and must do the
        same operations.
        """
        losses = []
        for layer in self.recorded:
            gates, config, types = layer.gates, layer.config, self.task_types.to(layer.gates.device)
            loss = balance_loss(
                gates, types, delta=config.balance_delta, attention_mask=layer.mask, num_experts=gates.shape[-1]
            )
            losses.append((config.balance_weight * loss).to(self.recorded[0].gates.device))
        return torch.stack(losses).sum()


class BalanceCollector:
    """Collects the gates of a model's layers in a forward pass, which its two hooks on the model begin and end.

    There is one for each model. `task_types` is always taken out of the batch, for the model does not know it. Outside
    of training nothing else happens. In training the sum over layers of weight * balance_loss is added to the output's
    loss, and also given as output["balance_loss"], for loops that compute their loss themselves. With Trainer's
    `num_items_in_batch` the loss is a part of a sum over the batches of an optimizer step, and what is added is the
    same part.

    Where a constraint is asked for and cannot act (no task_types, a loss without it, layers that see other tokens than
    the text's), a warning says so, once for each model and reason.
    """

    def __init__(self) -> None:
        # By thread, for DataParallel's replicas share their collector. None: a pass whose batch has no task_types.
        self.passes: dict[int, _ForwardPass | None] = {}
        self._warned: set[str] = set()
        self._used = False  # a loss with the constraint in it has been differentiated
        self._handles: list[RemovableHandle] = []

    @property
    def active(self) -> bool:
        """Whether a forward pass collects gates now."""
        return bool(self.passes) and (torch.compiler.is_compiling() or threading.get_ident() in self.passes)

    def _current(self) -> _ForwardPass | None:
        if torch.compiler.is_compiling():  # which cannot ask for the thread; replicas are not compiled
            return next(iter(self.passes.values()))
        return self.passes[threading.get_ident()]

    def record(self, key: str, gates: Tensor, output: Tensor, *, config: Any, trained: bool) -> None:
        """Takes one layer's gates.

        Args:
            key: the layer's name in the model.
            gates: [batch, time, num_experts], or [batch * time, num_experts] where the model gives the layer that.
            output: of the layer for the same tokens.
            config: the adapter's, a LoRAMoEConfig.
            trained: whether the gates should carry a gradient.

        Raises:
            RuntimeError: the gates of a trained adapter carry none.
        """
        forward_pass = self._current()
        if forward_pass is None:
            if trained:
                self._warn(NO_TASKS)
            return
        if trained and forward_pass.grad_enabled and not gates.requires_grad:
            raise RuntimeError(
                "the balance loss would get no gradient: reentrant gradient checkpointing runs this layer without one; "
                'use gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        grid = self._grids.of_layer(key, forward_pass.grids, gates)
        if grid is None:
            forward_pass.left_out.append(key)
            return
        mask = None if config.balance_include_padding else grid.mask
        forward_pass.recorded.append(_LayerGates(gates.reshape(*grid.shape, -1), mask, config))
        forward_pass.output = output

    def before_forward(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Forward pre-hook of the model; ValueError or TypeError where task_types are no 0 or 1 for each sample."""
        task_types = kwargs.pop("task_types", None)
        if not model.training:
            return args, kwargs
        if task_types is not None:
            self.passes[_thread()] = self._begin(model, torch.as_tensor(task_types), args, kwargs)
        elif NO_TASKS not in self._warned and torch.is_grad_enabled():
            self.passes[_thread()] = None
        return args, kwargs

    def _begin(self, model: nn.Module, task_types: Tensor, args: tuple, kwargs: dict) -> _ForwardPass:
        arguments = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
        grids = self._grids.of_batch(arguments)
        return _ForwardPass(
            task_types,
            grids,
            has_labels=arguments.get("labels") is not None,
            grad_enabled=torch.is_grad_enabled(),
            fraction=_loss_fraction(arguments.get("labels"), kwargs),
            check_values=_value_check(task_types, grids.get("text")),
        )

    def after_forward(self, model: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Forward hook of the model; called with output None where the forward raised.

        Returns:
            The output with the constraint in it; None where it stays as it is.

        Raises:
            TypeError: a tuple, whose first entry is no loss.
            ValueError: a task type is neither 0 nor 1.
        """
        forward_pass = self.passes.pop(_thread(), None)
        if forward_pass is None or output is None:
            return None
        if forward_pass.left_out:
            self._warn(
                "balance_weight: these layers see other tokens than the text's, and are left out of the balancing "
                f"constraint: {', '.join(dict.fromkeys(forward_pass.left_out))}"
            )
        if not forward_pass.recorded:
            return None
        if isinstance(output, tuple) and not forward_pass.has_labels:
            raise TypeError("task_types needs the model's dict output, or labels in the batch (return_dict=False)")
        forward_pass.check_values()
        total = forward_pass.total()
        self._warn_if_unused(total, forward_pass.output)
        if isinstance(output, tuple):
            return (output[0] + (forward_pass.fraction * total).to(output[0]), *output[1:])
        if output.get("loss") is not None:
            output["loss"] = output["loss"] + (forward_pass.fraction * total).to(output["loss"])
        output["balance_loss"] = total
        return output

    def _warn_if_unused(self, total: Tensor, output: Tensor | None) -> None:
        """Warns where a backward pass reaches `output`, of a layer, and not `total`, the constraint."""
        if self._used or UNUSED in self._warned or torch.compiler.is_compiling():
            return
        if output is None or not (total.requires_grad and output.requires_grad):
            return
        reached: list[bool] = []

        def decide() -> None:
            self._used = bool(reached)
            if not reached:
                self._warn(UNUSED)

        total.register_hook(lambda grad: reached.append(True))
        # At the end of the whole backward pass: on several devices either of the two may be first.
        output.register_hook(lambda grad: torch.autograd.Variable._execution_engine.queue_callback(decide))

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=2)

    def attach(self, model: nn.Module, keys: Iterable[str]) -> None:
        """Registers the two hooks on `model`, once; `keys`: the names of its layers."""
        self._grids = TokenGrids(model, keys)
        if not self._handles:
            self._handles = [
                model.register_forward_pre_hook(self.before_forward, with_kwargs=True),
                model.register_forward_hook(self.after_forward, with_kwargs=True, always_call=True),
            ]

    def detach(self) -> None:
        """Removes the hooks."""
        while self._handles:
            self._handles.pop().remove()


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _value_check(task_types: Tensor, text: Grid | None) -> Callable[[], None]:
    """Checks shape and dtype of task_types [batch]; the function that it returns checks that all values are 0 or 1.

    On a GPU the values are copied asynchronously: called after the forward was launched, it has nothing to wait for.
    """
    if task_types.dim() != 1 or (text is not None and task_types.shape[0] != text.shape[0]):
        expected = "[batch]" if text is None else f"[batch={text.shape[0]}]"
        raise ValueError(f"task_types must be {expected}, got {list(task_types.shape)}")
    if task_types.is_floating_point():
        raise TypeError(f"task_types must be integer or bool (0 or 1), got {task_types.dtype}")
    if task_types.dtype == torch.bool or torch.compiler.is_compiling():
        return lambda: None
    wrong, event = ((task_types != 0) & (task_types != 1)).any(), None
    if wrong.is_cuda:
        wrong, event = wrong.to("cpu", non_blocking=True), torch.cuda.Event()
        event.record()

    def check() -> None:
        if event is not None:
            event.synchronize()
        if wrong:
            raise ValueError(f"task_types must be 0 or 1 for each sample, got {task_types.tolist()}")

    return check


def _loss_fraction(labels: Tensor | None, kwargs: dict) -> Tensor | float:
    """This batch's part of the targets of an optimizer step; 1 where they are not counted."""
    items, targets = kwargs.get("num_items_in_batch"), kwargs.get("shift_labels")
    if targets is None and labels is not None:
        targets = labels[..., 1:]  # as Trainer counts
    if items is None or targets is None:
        return 1.0
    return targets.ne(-100).sum() / torch.as_tensor(items, device=targets.device)
