"""Conversations as token ids, and batches of them in which only the answers' logits are computed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

IGNORED = -100


@dataclass(frozen=True)
class Example:
    """Token ids of one text, their labels (-100 where the loss ignores them), and LoRAMoE's task type."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    task_type: int = 0

    @classmethod
    def of(cls, encoded: dict[str, list[int]], task_type: int = 0) -> "Example":
        """From "input_ids" and "labels", as :func:`gci_kernels.rega.encode` gives them."""
        return cls(tuple(encoded["input_ids"]), tuple(encoded["labels"]), task_type)

    @property
    def answer(self) -> int:
        """The number of tokens from the first labelled one on."""
        return len(self.ids) - next(index for index, label in enumerate(self.labels) if label != IGNORED)


@dataclass(frozen=True)
class Batch:
    """Examples padded on the left, so that all answers end together and the same last logits serve them all.

    Attributes:
        input_ids, attention_mask: [batch, time] int64.
        targets: [batch, kept] int64, the labels of the last tokens, -100 where the loss ignores them.
        task_types: [batch] int64.
    """

    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor
    task_types: Tensor

    @property
    def tokens(self) -> int:
        """The number of tokens without padding."""
        return int(self.attention_mask.sum())

    def logits(self, model: nn.Module, **kwargs: Tensor) -> tuple[Tensor, dict]:
        """The logits that predict the targets, [batch, kept, vocabulary] in the model's dtype, and the model's output.

        `kwargs` are further arguments of the model.
        """
        width, kept = self.input_ids.shape[1], self.targets.shape[1]
        output = model(
            input_ids=self.input_ids, attention_mask=self.attention_mask, use_cache=False,
            logits_to_keep=positions(width - kept - 1, width - 1), **kwargs,
        )  # fmt: skip
        return output.logits, output

    def losses(self, logits: Tensor) -> Tensor:
        """The cross entropy of each target that counts, [targets] float32, row after row."""
        counted = self.targets != IGNORED
        return F.cross_entropy(logits[counted].float(), self.targets[counted], reduction="none")


def collate(examples: Sequence[Example], pad: int) -> Batch:
    """One batch of `examples`, padded with the token id `pad`."""

    def padded(rows: Iterable[Sequence[int]], value: int) -> Tensor:
        return pad_sequence(list(map(torch.tensor, rows)), batch_first=True, padding_value=value, padding_side="left")

    ids, labels = padded((e.ids for e in examples), pad), padded((e.labels for e in examples), IGNORED)
    mask = padded(([1] * len(e.ids) for e in examples), 0)
    width = ids.shape[1]
    # No logits predict the first token of a text.
    answer = min(max(e.answer for e in examples), width - 1)
    return Batch(ids, mask, labels[:, width - answer :], torch.tensor([e.task_type for e in examples]))


def positions(first: int, end: int) -> Tensor:
    """`logits_to_keep` for the positions from `first` to before `end`; negative ones count from the end. int64.

    Given a count, the model would slice its hidden states, and for the product of a tensor that is not contiguous with
    a frozen head PyTorch copies the head for every row of the batch: seconds a step. Given positions it gathers them.
    """
    return torch.arange(first, end)


def by_length(examples: Sequence[Example], size: int) -> list[list[int]]:
    """Indices of `examples` in groups of `size`, similar lengths together, so that there is little padding."""
    order = sorted(range(len(examples)), key=lambda index: (len(examples[index].ids), index))
    return [order[first : first + size] for first in range(0, len(order), size)]


def plain(ids: Sequence[int]) -> Example:
    """A text of which every token but the first is predicted."""
    return Example(tuple(ids), (IGNORED, *ids[1:]))
