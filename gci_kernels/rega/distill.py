"""Self-distillation: the untouched model's own answers to general instructions, to be replayed in training."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from gci_kernels.models import model_state
from gci_kernels.progress import bar as progress_bar
from gci_kernels.rega.distilled import DistilledFile, kept
from gci_kernels.rega.instructions import Pair
from gci_kernels.rega.prompts import messages, render, require_text, supports_system, template_of

LOOP_WORDS, LOOP_TIMES = 8, 3


@dataclass(frozen=True)
class _Sampling:
    temperature: float
    top_p: float
    max_new_tokens: int

    def options(self) -> dict[str, Any]:
        """For generate(); top_k=0, because transformers keeps 50 tokens where nothing is said."""
        if not self.temperature:
            return {"do_sample": False, "max_new_tokens": self.max_new_tokens}
        return {
            "do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0,
            "max_new_tokens": self.max_new_tokens,
        }  # fmt: skip


def distill(
    model: nn.Module,
    tokenizer: Any,
    instructions: Sequence[str],
    *,
    out: str | os.PathLike | None = None,
    prompt: str | None = None,
    temperature: float = 0.7,
    top_p: float = 0.95,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    seed: int = 0,
    after: Callable[[int], None] | None = None,
    progress: bool = True,
) -> list[Pair]:
    """The model's own answers to `instructions`: REGA's general training data (arXiv 2403.02756).

    Give the model as it is before training; one with adapters answers with those that are active. Answers are left out
    that are empty, or repeated: equal to one that was kept before, but for case and whitespace, or looping, with the
    same eight words in a row at three places or more (words are what whitespace divides). An answer that
    `max_new_tokens` cut is kept, and its record says that it is not finished. Batches are fixed by position, and each
    draws from a seed of its own, so a resumed run writes the bytes of an unbroken one.

    Args:
        model: a causal language model with generate(). It answers in evaluation mode, and then is as it was.
        tokenizer: its tokenizer, with a chat template.
        instructions: the general instructions, none of them empty.
        out: a .jsonl file for all answers with their seeds, dropped ones with the reason. Where it is there, the run
            goes on with it; default: no file.
        prompt: the central prompt; default: whatever the template writes without one.
        temperature: 0 takes the likeliest token each time.
        top_p: sample from the fewest tokens that have this probability together. The model's own generation_config
            (top_k, penalties and all) has no say.
        max_new_tokens: of an answer.
        batch_size: instructions at a time, which is what a killed run repeats at most.
        seed: of all that is drawn. PyTorch's own generators stay as they were.
        after: called with the number of answered instructions, after every batch.
        progress: show a bar on stderr, which goes when all is done.

    Returns:
        The pairs that were not left out, in order.

    Raises:
        RegaError: `out` is there and is damaged, or another run's (model, tokenizer, instructions, settings or seed).
            It stays as it is.
        ValueError: an argument is out of range, or the tokenizer has no chat template.
    """
    _check(instructions, prompt, temperature, top_p, {"max_new_tokens": max_new_tokens, "batch_size": batch_size}, seed)
    _special_tokens(model, tokenizer)  # raises, before there is a file
    system = supports_system(tokenizer)
    texts = [render(tokenizer, messages(prompt, text, system=system), generation=True) for text in instructions]
    sampling = _Sampling(float(temperature), float(top_p), max_new_tokens)
    seeds = [_batch_seed(seed, index // batch_size) for index in range(len(instructions))]
    with contextlib.ExitStack() as stack:
        file, records = None, []
        if out is not None:
            header = {
                **_identity(model, tokenizer, instructions), **vars(sampling),
                "prompt": prompt, "batch_size": batch_size, "seed": seed,
            }  # fmt: skip
            file = stack.enter_context(DistilledFile(Path(out), header, instructions, seeds, batch_size))
            records = list(file.records)
        stack.enter_context(_quiet(model))
        bar = stack.enter_context(progress_bar("distillation", len(texts), completed=len(records), shown=progress))
        seen = {_normal(pair.answer) for pair in kept(records)}
        for first in range(len(records), len(texts), batch_size):
            answers = _answers(model, tokenizer, texts[first : first + batch_size], sampling, seeds[first])
            made = [
                _record(first + place, instructions[first + place], seeds[first], *answer, seen)
                for place, answer in enumerate(answers)
            ]
            if file is not None:
                file.write(made)
            records += made
            bar.advance(len(made))
            if after:
                after(len(records))
    return kept(records)


def _check(
    instructions: Sequence[str], prompt: str | None, temperature: float, top_p: float, counts: dict[str, int], seed: int
) -> None:
    if isinstance(instructions, str) or not len(instructions):
        raise ValueError("instructions must be a sequence of at least one string")
    for index, text in enumerate(instructions):
        require_text(f"instruction {index}", text)
    if prompt is not None:
        require_text("prompt", prompt)
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be a number that is 0 or above, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    for name, count in counts.items():
        if type(count) is not int or count < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {count!r}")
    check_seed(seed)


def check_seed(seed: object) -> None:
    """Raises ValueError unless `seed` is a whole number of at least 0. Python's generator takes -1 for 1."""
    if type(seed) is not int or seed < 0:
        raise ValueError(f"seed must be a whole number of at least 0, got {seed!r}")


def _identity(model: nn.Module, tokenizer: Any, instructions: Sequence[str]) -> dict[str, Any]:
    """Who answers what. The device belongs to it, for each kind draws other numbers from a seed."""
    return {
        "model": _digest([model_state.fingerprint(model), model_state.adapter_states(model)]),
        "device": _device(model).type,
        "tokenizer": _digest([template_of(tokenizer), sorted(tokenizer.get_vocab().items())]),
        "instructions": _digest(list(instructions)),
        "count": len(instructions),
    }


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _batch_seed(seed: int, batch: int) -> int:
    """53 bits, which every reader of JSON keeps."""
    return int.from_bytes(hashlib.sha256(f"{seed} {batch}".encode()).digest()[:8], "little") >> 11


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextlib.contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and a generation config that says nothing but the special tokens; then all as before."""
    modes = [(module, module.training) for module in model.modules()]
    inner = model_state.base_model(model)
    config = inner.generation_config
    ends = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    try:
        model.eval()
        inner.generation_config = GenerationConfig(**ends)
        yield
    finally:
        inner.generation_config = config
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def _answers(
    model: Any, tokenizer: Any, texts: Sequence[str], sampling: _Sampling, seed: int
) -> Iterator[tuple[str, int, bool]]:
    """Of each text the answer, the number of its tokens, and whether it came to its end."""
    ends, pad = _special_tokens(model, tokenizer)
    ids, mask = _padded([tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts], pad)
    device = _device(model)
    with torch.no_grad(), _seeded(seed):
        made = model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), eos_token_id=ends, pad_token_id=pad,
            **sampling.options(),
        )  # fmt: skip
    for row in made[:, ids.shape[1] :].tolist():
        stop = next((place for place, token in enumerate(row) if token in ends), None)
        count = len(row) if stop is None else stop + 1
        yield tokenizer.decode(row[:count], skip_special_tokens=True).strip(), count, stop is not None


def _special_tokens(model: Any, tokenizer: Any) -> tuple[list[int], int]:
    """The tokens that end an answer, and the one that pads: any at all, for it is masked, and comes after the end."""
    known = model_state.base_model(model).generation_config.eos_token_id
    ends = [known] if isinstance(known, int) else list(known or [])
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    if not ends:
        raise ValueError("no answer would end: the model's generation_config and the tokenizer have no eos token")
    return ends, ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _padded(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def _record(
    index: int, instruction: str, seed: int, answer: str, tokens: int, finished: bool, seen: set[str]
) -> dict[str, Any]:
    normal = _normal(answer)
    dropped = "empty" if not normal else "repeated" if normal in seen or _loops(normal.split()) else None
    if dropped is None:
        seen.add(normal)
    return {
        "index": index, "instruction": instruction, "answer": answer, "seed": seed, "tokens": tokens,
        "finished": finished, "dropped": dropped,
    }  # fmt: skip


def _normal(answer: str) -> str:
    return " ".join(answer.casefold().split())


def _loops(words: Sequence[str]) -> bool:
    runs: dict[tuple[str, ...], int] = {}
    for start in range(len(words) - LOOP_WORDS + 1):
        run = tuple(words[start : start + LOOP_WORDS])
        runs[run] = runs.get(run, 0) + 1
    return any(count >= LOOP_TIMES for count in runs.values())
