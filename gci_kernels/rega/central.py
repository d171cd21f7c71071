"""The central prompt, which precedes every request, computed once: each generate() gets its keys and values."""

import copy
import inspect
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from gci_kernels.models import model_state
from gci_kernels.rega.prompts import RegaError, Roles, messages, require_text, supports_system, tokens

# User turns that begin in different ways, as one token may contain the prompt's end and a turn's first characters.
# The empty one is for vocabularies in which all the others are the same unknown token.
_BEGINNINGS = ("", "a", "Z", "0", " x", "\nx", "\tx", ".", "'s", "-", "é", "中", "🙂")


class CentralPrompt:
    """The central prompt's tokens and their keys and values, made by :func:`central_prompt_cache`.

    Attributes:
        prompt: the central prompt.
        prefix: the tokens that every request begins with, whose keys and values are cached.
    """

    def __init__(self, model: Any, tokenizer: Any, prompt: str, system: bool, prefix: list[int], cache: Cache) -> None:
        self.prompt, self.prefix = prompt, prefix
        self._model, self._tokenizer, self._system, self._cache = model, tokenizer, system, cache
        self._adapters, self._weights = model_state.adapter_states(model), model_state.parameter_versions(model)

    def request(self, instructions: str | Sequence[str], *, copies: int = 1) -> dict[str, Any]:
        """Arguments for generate(): `model.generate(**central.request("..."), max_new_tokens=64)`.

        In a batch, shorter requests have masked padding between the prefix and themselves, so that the prefix is at
        the same positions in all. Generate with the model and the adapters that computed the prefix: `adapter_names`
        would continue it with others.

        Args:
            instructions: the user's turn, or several for a batch.
            copies: the larger of num_beams and num_return_sequences in the call of generate(), which repeats the tokens
                that often but not the cache.

        Returns:
            input_ids and attention_mask [batch, time], on the model's device, prefix included; past_key_values, a copy
            of the cache for this batch and its copies.

        Raises:
            RegaError: weights or active adapters have changed since the prefix was computed, or the model is in
                training mode. Writes through `.data` are not noticed: make a new cache after them.
            ValueError: an instruction is no text or doesn't continue the prefix; or the batch needs padding, and the
                model has sliding windows or takes no position_ids, so that it would count padding as tokens.
        """
        self._check_state()
        texts = [instructions] if isinstance(instructions, str) else list(instructions)
        if not texts:
            raise ValueError("instructions must be a string or a sequence of at least one")
        if copies < 1:
            raise ValueError(f"copies must be at least 1, got {copies}")
        length = len(self.prefix)
        rests = [self._tokens(index, text)[length:] for index, text in enumerate(texts)]
        width = max(map(len, rests))
        if any(len(rest) < width for rest in rests):
            self._check_padding()
        pads = [width - len(rest) for rest in rests]
        ids = [self.prefix + [self._pad] * pad + rest for pad, rest in zip(pads, rests, strict=True)]
        mask = [[1] * length + [0] * pad + [1] * len(rest) for pad, rest in zip(pads, rests, strict=True)]
        cache: Any = copy.deepcopy(self._cache)
        if len(texts) * copies > 1:
            cache.batch_repeat_interleave(len(texts) * copies)
        device = self._model.device
        return {
            "input_ids": torch.tensor(ids, device=device),
            "attention_mask": torch.tensor(mask, device=device),
            "past_key_values": cache,
        }

    @property
    def _pad(self) -> int:
        """Any token will do: padding is masked."""
        known = (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id, self.prefix[0])
        return next(token for token in known if token is not None)

    def _tokens(self, index: int, instruction: str) -> list[int]:
        require_text(f"instruction {index}", instruction)
        ids = tokens(self._tokenizer, messages(self.prompt, instruction, system=self._system), generation=True)
        if ids[: len(self.prefix)] != self.prefix or len(ids) == len(self.prefix):
            raise ValueError(
                f"instruction {index} doesn't continue the central prompt's {len(self.prefix)} tokens: its beginning "
                "changes how the prompt is cut into tokens; give it to generate() without the kept prompt"
            )
        return ids

    def _check_state(self) -> None:
        changed = None
        if self._model.training:
            changed = "the model is in training mode: call model.eval()"
        elif model_state.adapter_states(self._model) != self._adapters:
            changed = "other adapters are active, or with other weight: set them as they were, or make a new cache"
        elif model_state.parameter_versions(self._model) != self._weights:
            changed = "the model's parameters have changed: make a new cache with central_prompt_cache"
        if changed:
            raise RegaError(f"the kept central prompt doesn't fit the model any more: {changed}")

    def _check_padding(self) -> None:
        if any(type(layer) is not DynamicLayer for layer in self._cache.layers):
            why = "it has sliding windows, in which padding takes the place of tokens"
        elif "position_ids" not in inspect.signature(model_state.base_model(self._model).forward).parameters:
            why = "it takes no position_ids, so padding inside would move what follows"
        else:
            return
        raise ValueError(f"requests of different lengths can't be one batch for this model: {why}. Ask one at a time")


def central_prompt_cache(model: nn.Module, tokenizer: Any, roles: Roles) -> CentralPrompt:
    """Computes the central prompt once for all requests; REGA's inference has no other (arXiv 2403.02756).

    The cached prefix is what all requests have in common: all up to the user's turn, or, where the chat template has no
    system turn, up to the instruction in it.

    Args:
        model: a causal language model in evaluation mode, or a PeftModel around one.
        tokenizer: its tokenizer, with a chat template.
        roles: whose central prompt it is.

    Raises:
        RegaError: the model is in training mode.
        ValueError: there is no chat template; it begins with the instruction, so that requests share no token; or the
            model caches something other than keys and values.
    """
    if model.training:
        raise RegaError("the model is in training mode, in which dropout changes what is kept: call model.eval()")
    system = supports_system(tokenizer)
    rows = [tokens(tokenizer, messages(roles.central, text, system=system), generation=True) for text in _BEGINNINGS]
    same = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))
    prefix = [column[0] for column in same]
    if not prefix:
        raise ValueError("the chat template puts nothing in front of the instruction, so requests have no common token")
    device: Any = model.device
    with torch.no_grad():
        cache = model(input_ids=torch.tensor([prefix], device=device), use_cache=True).past_key_values
    if not isinstance(cache, Cache) or any(
        type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
    ):
        raise ValueError("the model keeps more of past tokens than keys and values, or none: its prompt can't be kept")
    return CentralPrompt(model, tokenizer, roles.central, system, prefix, cache)
