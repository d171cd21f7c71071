"""Evaluation of a trained model: losses, the KL divergence from the original model, and answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from .batches import IGNORED, Batch, Example, by_length, collate, positions
from .domain import GROUPS, Task, score
from .general import Choice

BATCH = 16  # as many as the decoding kernels take at once


@dataclass(frozen=True)
class Point:
    """The evaluation of a model after some training steps. Losses are in nats a token.

    Attributes:
        step, tokens: how much it was trained.
        domain_loss: on held-out tasks.
        general_loss: on general texts.
        kl_texts, kl_own: KL divergence from the original model, on those texts and on its own answers.
    """

    step: int
    tokens: int
    domain_loss: float
    general_loss: float
    kl_texts: float
    kl_own: float


@dataclass(frozen=True)
class HeldOut:
    """Material that is not trained on.

    Attributes:
        domain: tasks to generate answers for.
        loss_tasks: conversations about some of these tasks, for the domain loss.
        texts: general texts, of which every token counts.
        own: general instructions with the original model's own answers.
        arithmetic, glosses: multiple-choice questions.
    """

    domain: list[Task]
    loss_tasks: list[Example]
    texts: list[Example]
    own: list[Example]
    arithmetic: list[Choice]
    glosses: list[Choice]


class Evaluator:
    """Compares models with the original one, whose logits on the general material are stored in its dtype.

    Args:
        untouched: the original model, in evaluation mode.
        tokenizer: its tokenizer.
        held_out: the material.
        chat: from a user's turn to the token ids of a request, up to the beginning of the answer.
    """

    def __init__(
        self,
        untouched: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        held_out: HeldOut,
        chat: Callable[[str], list[int]],
    ) -> None:
        self.tokenizer, self.held_out, self.chat = tokenizer, held_out, chat
        self.pad = tokenizer.pad_token_id
        self.domain = self._batches(held_out.loss_tasks)
        self.general = {"texts": self._batches(held_out.texts), "own": self._batches(held_out.own)}
        with torch.inference_mode():
            self.reference = {
                name: [batch.logits(untouched)[0][batch.targets != IGNORED] for batch in batches]
                for name, batches in self.general.items()
            }

    def _batches(self, examples: list[Example]) -> list[Batch]:
        return [collate([examples[i] for i in rows], self.pad) for rows in by_length(examples, BATCH)]

    @torch.inference_mode()
    def point(self, model: nn.Module, step: int, tokens: int) -> Point:
        """The losses and divergences of `model`, which must be in evaluation mode."""
        domain = [batch.losses(batch.logits(model)[0]) for batch in self.domain]
        general, distances = [], {name: [] for name in self.general}
        for name, batches in self.general.items():
            for batch, reference in zip(batches, self.reference[name], strict=True):
                logits = batch.logits(model)[0]
                distances[name].append(_kl(reference, logits[batch.targets != IGNORED]))
                if name == "texts":
                    general.append(batch.losses(logits))
        means = (torch.cat(found).double().mean().item() for found in (domain, general, *distances.values()))
        return Point(step, tokens, *means)

    @torch.inference_mode()
    def answers(self, model: nn.Module) -> dict[str, float]:
        """Shares of right answers, 0 to 1, by group of tasks, and for "arithmetic" and "glosses"."""
        found: dict[str, float] = {}
        tasks = self.held_out.domain
        written = self.generate(model, [task.prompt for task in tasks], 40)
        for group in GROUPS:
            scores = [score(task, text) for task, text in zip(tasks, written, strict=True) if task.group == group]
            found[group] = sum(scores) / len(scores)
        found["arithmetic"] = self.choose(model, self.held_out.arithmetic)
        found["glosses"] = self.choose(model, self.held_out.glosses)
        return found

    def generate(self, model: nn.Module, prompts: Sequence[str], new_tokens: int) -> list[str]:
        """The greedy answer to each prompt, of at most `new_tokens` tokens."""
        examples = [Example(tuple(ids), (0,) * len(ids)) for ids in map(self.chat, prompts)]
        texts = [""] * len(prompts)
        for rows in by_length(examples, BATCH):
            batch = collate([examples[i] for i in rows], self.pad)
            output = model.generate(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=new_tokens,
                do_sample=False, pad_token_id=self.pad, logits_to_keep=positions(-1, 0),
            )  # fmt: skip
            answers = self.tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
            for row, text in zip(rows, answers, strict=True):
                texts[row] = text
        return texts

    @torch.inference_mode()
    def choose(self, model: nn.Module, choices: Sequence[Choice]) -> float:
        """The share of `choices` whose right option has the highest mean log-probability of its tokens."""
        prompts = [Example(tuple(ids), (0,) * len(ids)) for ids in (self.chat(choice.prompt) for choice in choices)]
        right = 0
        for rows in by_length(prompts, BATCH // 2):
            likelihood = self._likelihood(
                model, [prompts[i] for i in rows], [option for i in rows for option in choices[i].options]
            )
            picked = likelihood.view(len(rows), -1).argmax(1).tolist()
            right += sum(pick == choices[i].right for pick, i in zip(picked, rows, strict=True))
        return right / len(choices)

    def _likelihood(self, model: nn.Module, prompts: list[Example], options: list[str]) -> Tensor:
        """The mean log-probability of each option's tokens after its prompt, [options] float32.

        `options` has the same number for each prompt, in the order of the prompts. A prompt is computed once.
        """
        batch, each = collate(prompts, self.pad), len(options) // len(prompts)
        output = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, logits_to_keep=positions(-1, 0),
            use_cache=True,
        )  # fmt: skip
        output.past_key_values.batch_repeat_interleave(each)
        rows = [torch.tensor(self.tokenizer(option, add_special_tokens=False)["input_ids"]) for option in options]
        tokens = pad_sequence(rows, batch_first=True, padding_value=IGNORED)
        present = tokens != IGNORED
        mask = torch.cat((batch.attention_mask.repeat_interleave(each, 0), present.long()), 1)
        ids, cache = tokens.masked_fill(~present, self.pad), output.past_key_values
        logits = model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits
        logits = torch.cat((output.logits.repeat_interleave(each, 0), logits[:, :-1]), 1)
        losses = F.cross_entropy(logits.float().mT, tokens, reduction="none", ignore_index=IGNORED)
        return -losses.sum(1) / present.sum(1)


def _kl(reference: Tensor, logits: Tensor) -> Tensor:
    """KL divergence of each row's distribution from the reference's, [rows] float32, of logits [rows, vocabulary]."""
    parts = []
    for old, new in zip(reference.split(256), logits.split(256), strict=True):
        old, new = old.float().log_softmax(-1), new.float().log_softmax(-1)
        parts.append((old.exp() * (old - new)).sum(-1))
    return torch.cat(parts)
