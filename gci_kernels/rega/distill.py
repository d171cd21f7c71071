"""Self-distillation: the original model's own answers to general instructions, to be replayed in training."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from gci_kernels.models import model_state
from gci_kernels.progress import bar as progress_bar
from gci_kernels.rega.distilled import DistilledFile, kept
from gci_kernels.rega.instructions import Pair
from gci_kernels.rega.prompts import messages, render, require_text, supports_system, template_of

LOOP_WORDS, LOOP_TIMES = 8, 3  # so many words, repeated so often, make an answer a loop


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

    Give the model as it is before training; a model with adapters answers with the active ones. Dropped are answers
    that are empty, or repeated: equal to an earlier one except for case and whitespace, or a loop, in which the same
    eight whitespace-separated words occur three times or more. An answer cut off by `max_new_tokens` is kept, and its
    record says that it is not finished. Batches depend on the position only, and each has its own seed, so a resumed
    run writes the same bytes as an uninterrupted one.

    Args:
        model: a causal language model with generate(). It answers in evaluation mode; its mode is restored.
        tokenizer: its tokenizer, with a chat template.
        instructions: the general instructions, none of them empty.
        out: a .jsonl file for all answers with their seeds, dropped ones with the reason. An existing file is resumed;
            default: no file.
        prompt: the central prompt; default: whatever the template writes without one.
        temperature: 0 for greedy decoding.
        top_p: sample from the smallest set of tokens with at least this probability. The rest of the model's
            generation_config (top_k, penalties) is not used.
        max_new_tokens: the longest answer.
        batch_size: instructions at a time; a killed run repeats one batch at most.
        seed: of the sampling. PyTorch's global generators are restored.
        after: called after every batch with the number of answered instructions.
        progress: show a progress bar on stderr, removed at the end.

    Returns:
        The pairs that were not dropped, in order.

    Raises:
        RegaError: `out` exists and is damaged, or another run's (model, tokenizer, instructions, settings or seed).
            It is not changed.
        ValueError: an argument is out of range, or the tokenizer has no chat template.
    """
    _check(instructions, prompt, temperature, top_p, {"max_new_tokens": max_new_tokens, "batch_size": batch_size}, seed)
    _special_tokens(model, tokenizer)  # raises before the file is created
    system = supports_system(tokenizer)
    texts = [render(tokenizer, messages(prompt, text, system=system), generation=True) for text in instructions]
    sampling = {"temperature": float(temperature), "top_p": float(top_p), "max_new_tokens": max_new_tokens}
    seeds = [_batch_seed(seed, index // batch_size) for index in range(len(instructions))]
    with contextlib.ExitStack() as stack:
        file, records = None, []
        if out is not None:
            header = {
                **_identity(model, tokenizer, instructions), **sampling,
                "prompt": prompt, "batch_size": batch_size, "seed": seed,
            }  # fmt: skip
            file = stack.enter_context(DistilledFile(Path(out), header, instructions, seeds, batch_size))
            records = list(file.records)
        stack.enter_context(_evaluation(model))
        bar = stack.enter_context(progress_bar("distillation", len(texts), completed=len(records), shown=progress))
        seen = {_normal(pair.answer) for pair in kept(records)}
        for first in range(len(records), len(texts), batch_size):
            answers = _answers(model, tokenizer, texts[first : first + batch_size], sampling, seeds[first])
            new = [
                _record(index, instructions[index], seeds[first], *answer, seen)
                for index, answer in enumerate(answers, first)
            ]
            if file is not None:
                file.write(new)
            records += new
            bar.advance(len(new))
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
    """What the answers depend on. The device type is part of it: each type draws other numbers from a seed."""
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
    """53 bits, which every JSON parser keeps exactly."""
    return int.from_bytes(hashlib.sha256(f"{seed} {batch}".encode()).digest()[:8], "little") >> 11


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextlib.contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and a generation config of the special tokens alone; both are restored."""
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


def _answers(
    model: Any, tokenizer: Any, texts: Sequence[str], sampling: dict[str, Any], seed: int
) -> Iterator[tuple[str, int, bool]]:
    """For each text the answer, the number of its tokens, and whether it is finished."""
    ends, pad = _special_tokens(model, tokenizer)
    rows = [torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left").to(_device(model))
    mask = pad_sequence(list(map(torch.ones_like, rows)), batch_first=True, padding_side="left").to(ids.device)
    # The default of transformers for top_k is 50.
    options = {"do_sample": True, "top_k": 0, **sampling}
    if not sampling["temperature"]:
        options = {"do_sample": False, "max_new_tokens": sampling["max_new_tokens"]}
    with torch.no_grad(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        output = model.generate(input_ids=ids, attention_mask=mask, eos_token_id=ends, pad_token_id=pad, **options)
    for row in output[:, ids.shape[1] :].tolist():
        stop = next((index for index, token in enumerate(row) if token in ends), None)
        count = len(row) if stop is None else stop + 1
        yield tokenizer.decode(row[:count], skip_special_tokens=True).strip(), count, stop is not None


def _special_tokens(model: Any, tokenizer: Any) -> tuple[list[int], int]:
    """The tokens that end an answer, and one for padding: any token will do, as padding is masked."""
    known = model_state.base_model(model).generation_config.eos_token_id
    ends = [known] if isinstance(known, int) else list(known or [])
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    if not ends:
        raise ValueError("no answer would end: the model's generation_config and the tokenizer have no eos token")
    return ends, ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id


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
