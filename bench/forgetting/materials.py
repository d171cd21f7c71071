"""What all runs share: the tasks, the general material, the original model's answers, LoKI's scores."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from gci_kernels import loki, rega
from gci_kernels.rega.distilled import read_records

from . import domain, general, sources
from .batches import Example, plain
from .evaluate import HeldOut

# SmolLM2's chat template has this prompt where no system prompt is given; in inference it is that of every method.
CENTRAL = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
LAW = "You are a lawyer who reads clauses of software licences and answers exactly what they say."
ROLES = rega.Roles(central=CENTRAL, domains={"law": LAW})
INTEGRATION = 0.1


@dataclass(frozen=True)
class Sizes:
    """How much there is of each part.

    Attributes:
        train, held_out: tasks of the domain.
        loss_tasks: held-out tasks for the domain loss, equally many of each group.
        texts: general texts for the general loss.
        own: general instructions, answered by the original model, that are not trained on.
        replayed: other instructions, of which REGA's mixture replays those with finished answers.
        new_tokens: the most tokens of the original model's answer.
        arithmetic, glosses: multiple-choice questions.
        attributed: conversations of the original model for LoKI's attribution.
        max_tokens: the most of a training example.
    """

    train: int
    held_out: int
    loss_tasks: int
    texts: int
    own: int
    replayed: int
    new_tokens: int
    arithmetic: int
    glosses: int
    attributed: int
    max_tokens: int = 320


class Materials:
    """The material of a comparison, computed on first use and stored in `folder`.

    Args:
        folder: the folder, which exists.
        tokenizer: the model's.
        sizes: how much to make.
        log: called with a line before each slow step.
    """

    def __init__(
        self, folder: Path, tokenizer: PreTrainedTokenizerBase, sizes: Sizes, log: Callable[[str], None]
    ) -> None:
        self.folder, self.tokenizer, self.sizes, self.log = folder, tokenizer, sizes, log
        self.licences = sources.licences(log)
        self.tasks = domain.make(self.licences, train=sizes.train, held_out=sizes.held_out, seed=0)[1]

    @property
    def scores(self) -> Path:
        """The file of LoKI's scores."""
        return self.folder / "scores.safetensors"

    def chat(self, instruction: str) -> list[int]:
        """Token ids of a request under the central prompt, up to the beginning of the answer."""
        turns = rega.messages(CENTRAL, instruction)
        return self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]

    def _encode(self, instruction: str, answer: str) -> dict[str, list[int]]:
        return rega.encode(self.tokenizer, rega.messages(CENTRAL, instruction, answer))

    def prepare(self, load: Callable[[torch.dtype], nn.Module]) -> None:
        """Computes what needs the original model: its answers and, in float32, LoKI's scores of them.

        `load` gives the model in a dtype.

        Raises:
            RuntimeError: too few of the answers are usable.
        """
        model = load(torch.bfloat16).eval()
        wanted = self.sizes.own + self.sizes.replayed
        # Some answers are dropped, so there are a fifth more questions.
        questions = general.instructions(wanted + wanted // 5, seed=0)
        self.log(f"the model answers {len(questions)} general instructions")
        pairs = rega.distill(
            model, self.tokenizer, questions, out=self.folder / "distilled.jsonl", prompt=CENTRAL,
            max_new_tokens=self.sizes.new_tokens, batch_size=16, seed=0,
        )  # fmt: skip
        if len(pairs) < wanted:
            raise RuntimeError(f"only {len(pairs)} of {len(questions)} own answers are usable, {wanted} are needed")
        self.own, general_pairs = pairs[: self.sizes.own], pairs[self.sizes.own : wanted]
        # An answer that was cut off would teach the model to stop anywhere.
        records = read_records(self.folder / "distilled.jsonl")
        finished = {record["instruction"] for record in records if record["finished"]}
        self.replayed = [pair for pair in general_pairs if pair.instruction in finished]
        self.log(f"LoKI's attribution over {self.sizes.attributed} of them")
        samples = [self._encode(p.instruction, p.answer)["input_ids"] for p in general_pairs[: self.sizes.attributed]]
        loki.attribute_file(model.float().requires_grad_(False), samples, self.scores)

    def held_out(self) -> HeldOut:
        """The material for evaluation; :meth:`prepare` comes first."""
        sizes = self.sizes
        each = sizes.loss_tasks // len(domain.GROUPS)
        loss_tasks = [t for group in domain.GROUPS for t in [t for t in self.tasks if t.group == group][:each]]
        return HeldOut(
            domain=self.tasks,
            loss_tasks=[Example.of(self._encode(t.prompt, t.answer), t.task_type) for t in loss_tasks],
            texts=[
                plain(self.tokenizer(text)["input_ids"][:128]) for text in general.held_out_texts(sizes.texts, seed=0)
            ],
            own=[Example.of(self._encode(pair.instruction, pair.answer)) for pair in self.own],
            arithmetic=general.arithmetic(sizes.arithmetic, seed=0),
            glosses=general.gloss_choices(sizes.glosses, seed=0),
        )

    def examples(self, seed: int, with_rega: bool) -> tuple[list[Example], dict | None]:
        """The training examples of a seed, and the counts of REGA's mixture; None without REGA."""
        tasks = domain.make(self.licences, train=self.sizes.train, held_out=self.sizes.held_out, seed=seed)[0]
        if not with_rega:
            return [Example.of(self._encode(t.prompt, t.answer), t.task_type) for t in tasks], None
        pairs = [rega.Pair(task.prompt, task.answer) for task in tasks]
        mixed, counts = rega.mixture(self.replayed, {"law": pairs}, ROLES, integration=INTEGRATION, seed=seed)
        encoded = [rega.encode(self.tokenizer, m["messages"], max_length=self.sizes.max_tokens) for m in mixed]
        return [Example.of(found) for found in encoded], {
            "general": counts.general, "domain": counts.domains["law"], "integrated": counts.integrated["law"],
        }  # fmt: skip
