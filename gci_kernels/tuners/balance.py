"""Carries the gates of all LoRAMoE layers to the model's loss: the localized balancing constraint in training."""

import inspect
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gci_kernels.ops import balance_loss


@dataclass
class _Recorded:
    """One layer's gates and the settings of its adapter."""

    gates: Tensor
    weight: float
    delta: float
    include_padding: bool


@dataclass
class _Pass:
    """One forward pass of the model with `task_types` in its batch."""

    task_types: Tensor
    attention_mask: Tensor | None
    has_labels: bool
    grad_enabled: bool
    share: Tensor | float  # of the optimizer step's loss that this batch makes
    recorded: list[_Recorded] = field(default_factory=list)

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
                attention_mask=None if layer.include_padding else self.attention_mask,
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
    """

    def __init__(self) -> None:
        self._pass: _Pass | None = None

    @property
    def active(self) -> bool:
        """Whether gates are wanted now."""
        return self._pass is not None

    def record(self, gates: Tensor, *, weight: float, delta: float, include_padding: bool, trained: bool) -> None:
        """Takes one layer's gates [batch, time, num_experts]; `trained`: whether they should carry a gradient."""
        if trained and self._pass.grad_enabled and not gates.requires_grad:
            raise RuntimeError(
                "the balance loss would get no gradient: reentrant gradient checkpointing runs this layer without one; "
                'use gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        self._pass.recorded.append(_Recorded(gates, weight, delta, include_padding))

    def before_forward(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Forward pre-hook of the model."""
        task_types = kwargs.pop("task_types", None)
        if task_types is not None and model.training:
            given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
            self._pass = _Pass(
                torch.as_tensor(task_types),
                given.get("attention_mask"),
                has_labels=given.get("labels") is not None,
                grad_enabled=torch.is_grad_enabled(),
                share=_share(given.get("labels"), kwargs),
            )
        return args, kwargs

    def after_forward(self, model: nn.Module, args: tuple, kwargs: dict, output):
        """Forward hook of the model; called with output None where the forward raised."""
        done, self._pass = self._pass, None
        if done is None or not done.recorded or output is None:
            return None
        if isinstance(output, tuple):
            if not done.has_labels:
                raise TypeError("task_types needs the model's dict output, or labels in the batch (return_dict=False)")
            return (output[0] + (done.share * done.total()).to(output[0]), *output[1:])
        total = done.total()
        if output.get("loss") is not None:
            output["loss"] = output["loss"] + (done.share * total).to(output["loss"])
        output["balance_loss"] = total
        return output

    def attach(self, model: nn.Module) -> list:
        """Puts the two hooks on `model`; returns their handles."""
        return [
            model.register_forward_pre_hook(self.before_forward, with_kwargs=True),
            model.register_forward_hook(self.after_forward, with_kwargs=True, always_call=True),
        ]


def _share(labels: Tensor | None, kwargs: dict) -> Tensor | float:
    """Of the targets of an optimizer step those in this batch; 1 where nobody counted them."""
    items, targets = kwargs.get("num_items_in_batch"), kwargs.get("shift_labels")
    if items is None or (labels is None and targets is None):
        return 1.0
    targets = labels[..., 1:] if targets is None else targets  # as Trainer counts
    return targets.ne(-100).sum() / torch.as_tensor(items, device=targets.device)
