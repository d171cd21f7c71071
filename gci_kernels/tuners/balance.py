"""Carries the gates of all LoRAMoE layers to the model's loss: the localized balancing constraint in training."""

import inspect
import threading
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

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
class _Recorded:
    """One layer's gates [batch, time, num_experts], which tokens count, and the settings of its adapter."""

    gates: Tensor
    mask: Tensor | None
    weight: float
    delta: float


@dataclass
class _Pass:
    """One forward pass of the model in training with `task_types` in its batch."""

    task_types: Tensor
    grids: dict[str, Grid]
    has_labels: bool
    grad_enabled: bool
    share: Tensor | float  # of the optimizer step's loss that this batch makes
    check_values: Callable[[], None]
    recorded: list[_Recorded] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    output: Tensor | None = None  # of a layer that has been recorded

    def total(self) -> Tensor:
        """The sum over layers of weight * balance_loss. Computed after the layers: under gradient checkpointing their
        forward runs again without a pass, and must do the same operations."""
        device = self.recorded[0].gates.device
        losses = [
            layer.weight
            * balance_loss(
                layer.gates,
                self.task_types.to(layer.gates.device),
                delta=layer.delta,
                attention_mask=layer.mask,
                num_experts=layer.gates.shape[-1],
            ).to(device)
            for layer in self.recorded
        ]
        return torch.stack(losses).sum()


class BalanceCollector:
    """One for each model; its layers hand in their gates, its two hooks on the model begin and end a pass.

    `task_types` is always taken out of the batch, for the model does not know it. Outside of training nothing else
    happens. In training the sum over layers of weight * balance_loss is added to the output's loss, and also given as
    output["balance_loss"], for loops that compute their loss themselves. With Trainer's `num_items_in_batch`
    the loss is a part of a sum over the batches of an optimizer step, and what is added is the same part.

    Where a constraint is asked for and cannot act (no task_types, a loss without it, layers that see other tokens than
    the text's), a warning says so, once for each model and reason.
    """

    def __init__(self) -> None:
        # By thread, for DataParallel's replicas share their collector. None: a pass whose batch has no task_types.
        self._passes: dict[int, _Pass | None] = {}
        self._told: set[str] = set()
        self._used = False  # a loss with the constraint in it has been differentiated
        self._handles: list = []

    @property
    def active(self) -> bool:
        """Whether gates are wanted now."""
        return bool(self._passes) and (torch.compiler.is_compiling() or threading.get_ident() in self._passes)

    def _current(self) -> _Pass | None:
        if torch.compiler.is_compiling():  # which cannot ask for the thread; replicas are not compiled
            return next(iter(self._passes.values()))
        return self._passes[threading.get_ident()]

    def record(
        self, key: str, gates: Tensor, output: Tensor, *, weight: float, delta: float, include_padding: bool,
        trained: bool,
    ) -> None:  # fmt: skip
        """Takes one layer's gates.

        Args:
            key: the layer's name in the model.
            gates: [batch, time, num_experts], or [batch * time, num_experts] where the model gives the layer that.
            output: what the layer makes of the same tokens.
            trained: whether the gates should carry a gradient.
        """
        now = self._current()
        if now is None:
            if trained:
                self._tell(NO_TASKS)
            return
        if trained and now.grad_enabled and not gates.requires_grad:
            raise RuntimeError(
                "the balance loss would get no gradient: reentrant gradient checkpointing runs this layer without one; "
                'use gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        grid = self._grids.of_layer(key, now.grids, gates)
        if grid is None:
            now.left_out.append(key)
            return
        mask = None if include_padding else grid.mask
        now.recorded.append(_Recorded(gates.reshape(*grid.shape, -1), mask, weight, delta))
        now.output = output

    def before_forward(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Forward pre-hook of the model."""
        task_types = kwargs.pop("task_types", None)
        if not model.training:
            return args, kwargs
        if task_types is not None:
            self._passes[_thread()] = self._begin(model, torch.as_tensor(task_types), args, kwargs)
        elif NO_TASKS not in self._told and torch.is_grad_enabled():
            self._passes[_thread()] = None
        return args, kwargs

    def _begin(self, model: nn.Module, task_types: Tensor, args: tuple, kwargs: dict) -> _Pass:
        given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
        grids = self._grids.of_batch(given)
        return _Pass(
            task_types,
            grids,
            has_labels=given.get("labels") is not None,
            grad_enabled=torch.is_grad_enabled(),
            share=_share(given.get("labels"), kwargs),
            check_values=_value_check(task_types, grids.get("text")),
        )

    def after_forward(self, model: nn.Module, args: tuple, kwargs: dict, output):
        """Forward hook of the model; called with output None where the forward raised."""
        done = self._passes.pop(_thread(), None)
        if done is None or output is None:
            return None
        if done.left_out:
            self._tell(
                "balance_weight: these layers see other tokens than the text's, and are left out of the balancing "
                f"constraint: {', '.join(dict.fromkeys(done.left_out))}"
            )
        if not done.recorded:
            return None
        if isinstance(output, tuple) and not done.has_labels:
            raise TypeError("task_types needs the model's dict output, or labels in the batch (return_dict=False)")
        done.check_values()
        total = done.total()
        self._watch(total, done.output)
        if isinstance(output, tuple):
            return (output[0] + (done.share * total).to(output[0]), *output[1:])
        if output.get("loss") is not None:
            output["loss"] = output["loss"] + (done.share * total).to(output["loss"])
        output["balance_loss"] = total
        return output

    def _watch(self, total: Tensor, output: Tensor) -> None:
        """Tells where a backward pass comes to the layers and not to the constraint."""
        if self._used or UNUSED in self._told or torch.compiler.is_compiling():
            return
        if not (total.requires_grad and output.requires_grad):
            return
        reached: list[bool] = []

        def decide() -> None:
            self._used = bool(reached)
            if not reached:
                self._tell(UNUSED)

        total.register_hook(lambda grad: reached.append(True))
        # At the end of the whole backward pass: on several devices either of the two may be first.
        output.register_hook(lambda grad: torch.autograd.Variable._execution_engine.queue_callback(decide))

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            warnings.warn(message, stacklevel=2)

    def attach(self, model: nn.Module, keys: Iterable[str]) -> None:
        """Puts the two hooks on `model`, once; `keys`: the names of its layers."""
        self._grids = TokenGrids(model, keys)
        if not self._handles:
            self._handles = [
                model.register_forward_pre_hook(self.before_forward, with_kwargs=True),
                model.register_forward_hook(self.after_forward, with_kwargs=True, always_call=True),
            ]

    def detach(self) -> None:
        """Takes them back."""
        while self._handles:
            self._handles.pop().remove()


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _value_check(task_types: Tensor, text: Grid | None) -> Callable[[], None]:
    """Raises what can be seen at once; what it returns raises where a value is neither 0 nor 1.

    On a GPU the answer is on its way meanwhile: waiting for it only after the forward has been launched costs nothing.
    """
    if task_types.dim() != 1 or (text is not None and task_types.shape[0] != text.shape[0]):
        wanted = "[batch]" if text is None else f"[batch={text.shape[0]}]"
        raise ValueError(f"task_types must be {wanted}, got {list(task_types.shape)}")
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


def _share(labels: Tensor | None, kwargs: dict) -> Tensor | float:
    """Of the targets of an optimizer step those in this batch; 1 where nobody counted them."""
    items, targets = kwargs.get("num_items_in_batch"), kwargs.get("shift_labels")
    if items is None or (labels is None and targets is None):
        return 1.0
    targets = labels[..., 1:] if targets is None else targets  # as Trainer counts
    return targets.ne(-100).sum() / torch.as_tensor(items, device=targets.device)
