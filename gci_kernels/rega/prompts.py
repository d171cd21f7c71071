"""Role prompts, and chats rendered by a tokenizer's template into tokens and labels."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError

GENERAL = "general"  # the general domain's name in counts; its prompt is the central one
IGNORED = -100  # the label that losses ignore
_PROBE = "Gci7Kernels"  # a text that occurs in no template


class RegaError(ValueError):
    """A file or a cache that doesn't belong to this run or state. The message names it and what to do."""


@dataclass(frozen=True)
class Roles:
    """REGA's prompts (arXiv 2403.02756): one for general instructions and for inference, one for each special domain.

    Args:
        central: the central prompt.
        domains: a role prompt for each domain, by the domain's name. "general" is no domain's name.

    Raises:
        ValueError: a prompt or a name is not a string with text in it, or there is no domain.
    """

    central: str
    domains: Mapping[str, str]

    def __post_init__(self) -> None:
        require_text("the central prompt", self.central)
        if not isinstance(self.domains, Mapping) or not self.domains:
            raise ValueError("domains must be a mapping from at least one domain's name to its role prompt")
        for name, prompt in self.domains.items():
            require_text("a domain's name", name)
            require_text(f"the role prompt of {name!r}", prompt)
        if GENERAL in self.domains:
            raise ValueError(f"{GENERAL!r} can't be a special domain: general instructions have the central prompt")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Roles":
        """The roles in a JSON file {"central": PROMPT, "domains": {NAME: PROMPT}}.

        Raises:
            ValueError: it is no such file; the message begins with its path.
            OSError: it can't be read.
        """
        try:
            value = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not JSON: {error}") from error
        if not isinstance(value, dict) or set(value) != {"central", "domains"}:
            raise ValueError(f'{path}: must be {{"central": PROMPT, "domains": {{NAME: PROMPT}}}}')
        try:
            return cls(value["central"], value["domains"])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def require_text(what: str, value: object) -> str:
    """`value`; ValueError unless it is a string that holds more than whitespace and can be written as UTF-8."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{what} must be a string with text in it, got {value!r:.60}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{what} holds half of a surrogate pair, which no UTF-8 file can: {value!r:.60}")
    return value


def messages(prompt: str | None, instruction: str, answer: str | None = None, *, system: bool = True) -> list[dict]:
    """One exchange as a list of messages.

    Args:
        prompt: the central or a role prompt; None leaves it out.
        instruction: the user's turn.
        answer: the assistant's turn; None leaves it out.
        system: whether the template has a system turn (see :func:`supports_system`). Without one the prompt precedes
            the instruction in the user's turn, separated by an empty line.
    """
    turns = []
    if prompt is not None and system:
        turns.append({"role": "system", "content": prompt})
    elif prompt is not None:
        instruction = f"{prompt}\n\n{instruction}"
    turns.append({"role": "user", "content": instruction})
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    return turns


def template_of(tokenizer: Any) -> str:
    """The tokenizer's chat template.

    Raises:
        ValueError: it has none.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the tokenizer has no chat template, so no prompt can be put in front of an instruction: set "
            "tokenizer.chat_template to that of the model's family, or take an instruction-tuned model"
        )
    return tokenizer.get_chat_template()


def render(tokenizer: Any, turns: Sequence[Mapping], *, generation: bool) -> str:
    """The turns as the template writes them; with `generation`, followed by the beginning of an answer.

    Raises:
        ValueError: there is no template, or it can't render them.
    """
    template_of(tokenizer)
    try:
        return tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=generation)
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise ValueError(f"the tokenizer's chat template can't render the turns {roles}: {error}") from error


def supports_system(tokenizer: Any) -> bool:
    """Whether the chat template renders a system turn. Some templates raise an error, some drop its text silently.

    Raises:
        ValueError: there is no template, or it can't even render a user's turn.
    """
    render(tokenizer, messages(None, "x"), generation=True)
    try:
        return _PROBE in tokenizer.apply_chat_template(messages(_PROBE, "x"), tokenize=False)
    except TemplateError:
        return False


def tokens(tokenizer: Any, turns: Sequence[Mapping], *, generation: bool) -> list[int]:
    """The ids of :func:`render`'s text. The template writes the special tokens, so the tokenizer adds none."""
    return tokenizer(render(tokenizer, turns, generation=generation), add_special_tokens=False)["input_ids"]


def encode(tokenizer: Any, messages: Sequence[Mapping], *, max_length: int | None = None) -> dict[str, list[int]]:
    """A training example: the tokens of a chat, and labels for its last answer only.

    Args:
        tokenizer: with a chat template; the template needs no {% generation %} markers.
        messages: a chat that ends with the assistant's turn.
        max_length: longer chats are cut off on the right; default: no limit.

    Returns:
        "input_ids", and "labels": -100 except for the last answer and the end-of-turn tokens after it, so that a model
        learns to stop.

    Raises:
        ValueError: no chat template; the chat doesn't end with an answer; its tokens don't begin with those of the
            prompt; max_length leaves nothing of the answer.
    """
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError("messages must end with an assistant's turn that answers the one before")
    prompt = tokens(tokenizer, messages[:-1], generation=True)
    ids = tokens(tokenizer, messages, generation=False)
    start = len(prompt)
    if ids[:start] != prompt:
        raise ValueError(_why_no_prefix(tokenizer, messages))
    ids = ids[:max_length]
    if len(ids) <= start:
        raise ValueError(f"nothing of the answer is left to learn: the prompt has {start} tokens, all have {len(ids)}")
    return {"input_ids": ids, "labels": [IGNORED] * start + ids[start:]}


def _why_no_prefix(tokenizer: Any, messages: Sequence[Mapping]) -> str:
    prompt = render(tokenizer, messages[:-1], generation=True)
    if render(tokenizer, messages, generation=False).startswith(prompt):
        return (
            "the answer's first characters become one token with the prompt's last, so no label can tell them apart: "
            "the chat template should end the prompt with a special token or a line break"
        )
    return (
        "the chat template writes the prompt otherwise once an answer follows, so the answer's tokens can't be found: "
        "its add_generation_prompt must write what it writes in front of an answer"
    )
