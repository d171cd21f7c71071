"""A whole model as the frozen base, in eager PyTorch and in gci_kernels, and what is measured of it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase as Tokenizer

import gci_kernels

from .baselines import adapter_leaves, shared_copy, to_eager
from .cases import LORA_ALPHA, adapter_config, change_adapters, random_rows, ranks, trained_rows
from .models import ModelError, seeded
from .timing import Timing, interleave, kept_copies, peak_memory, saved_bytes

MLP, ATTENTION = ["gate_proj", "up_proj", "down_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"]
TARGETS = {"lora": MLP, "loramoe": MLP, "alora": ATTENTION}  # LoKI finds each layer's last projection itself
QUESTION = "Explain in one sentence why the sky is blue."


def model_variants(model: nn.Module, method: str, adapter_dtype: torch.dtype | None = None) -> dict[str, nn.Module]:
    """The columns of the table: "frozen", "eager" and "gci", around the same base weights, in training mode.

    `model` itself becomes the frozen one. The adapters of both adapted ones hold the same values, which are not an
    adapter's initial ones: with B zero most gradients are zero, with trained rows equal to the base's their positions
    do not matter, and a comparison could not fail. `adapter_dtype`: None for the model's own, in which the published
    code trains and eager PyTorch is fastest; PEFT's default is float32.

    Raises:
        ModelError: the model has no layers for the method.
    """
    model.requires_grad_(False)
    adapter_dtype = adapter_dtype or model.dtype
    config = _config(model, method)
    try:
        with seeded(model.device):
            if method == "lora":
                eager = get_peft_model(shared_copy(model), config)
                _prepare(eager, adapter_dtype)
                gci = gci_kernels.patch(shared_copy(eager))
            else:
                gci = gci_kernels.patch(shared_copy(model), config)
                _prepare(gci, adapter_dtype)
                eager = to_eager(gci)
    except ValueError as error:
        raise ModelError(f"this model can't be adapted: {error}") from error
    return {"frozen": model.train(), "eager": eager.train(), "gci": gci.train()}


def _config(model: nn.Module, method: str) -> PeftConfig:
    """An adapter of the layer cases' size. LoKI's rows differ from layer to layer and are drawn with a fixed seed."""
    if method == "loki":
        config, generator = model.config.get_text_config(), torch.Generator().manual_seed(0)
        shape = config.hidden_size, trained_rows(config.hidden_size)
        rows = [random_rows(*shape, generator).tolist() for _ in range(config.num_hidden_layers)]
        return gci_kernels.LoKIConfig(positions=rows)
    if method == "lora":
        return LoraConfig(r=ranks("lora")[0], lora_alpha=LORA_ALPHA, target_modules=MLP)
    targets = TARGETS.get(method, ATTENTION)
    return dataclasses.replace(adapter_config(method), target_modules=targets)


def _prepare(model: nn.Module, dtype: torch.dtype) -> None:
    for layer in model.modules():
        for role, parameters in adapter_leaves(layer).items():
            for parameter in parameters:
                if role == "B":
                    nn.init.normal_(parameter, std=0.02)
                elif role.startswith("active"):  # a change after which the model still writes sentences
                    parameter.data += 0.1 * parameter.data.abs().mean() * torch.randn_like(parameter)
                parameter.data = parameter.data.to(dtype)


def random_ids(model: nn.Module, batch: int, seq: int) -> Tensor:
    """[batch, seq] int64 token ids on the model's device, drawn with a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (batch, seq), generator=generator).to(model.device)


def training_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """The language model's loss (a scalar) for ids [batch, seq], from embeddings that require a gradient.

    They require one in every variant, so that the frozen base too computes dX in all its layers.
    """
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    return model(inputs_embeds=embeddings, labels=ids, use_cache=False).loss


def train_step(model: nn.Module, ids: Tensor) -> None:
    """Forward and backward, without an optimizer's step, as the frozen base has no parameters to update."""
    for parameter in model.parameters():
        parameter.grad = None
    training_loss(model, ids).backward()


def measure_training(
    variants: dict[str, nn.Module], *, batch: int, seq: int, **how: Any
) -> tuple[dict[str, Timing], dict[str, dict]]:
    """Times of a train step by variant, and what it needs: "peak_memory" and "copies" in bytes, "saved" a token.

    "copies" is what LoKI's layers keep from step to step beside their weights; the other two numbers do not contain it.
    The adapters' weights change before every timed step, so that the time contains making those copies again.
    `how` goes to :func:`.timing.interleave`: rounds and the like.
    """
    ids = random_ids(variants["frozen"], batch, seq)
    steps = {name: lambda model=model: train_step(model, ids) for name, model in variants.items()}
    saved = {
        name: saved_bytes(lambda model=model: training_loss(model, ids), model) / ids.numel()
        for name, model in variants.items()
    }
    # This runs every step once, which is their warm-up.
    peak = {name: peak_memory(step, ids.device) for name, step in steps.items()}
    copies = {name: sum(copy.nbytes for copy in kept_copies(model)) for name, model in variants.items()}
    before = {name: lambda model=model: change_adapters(model) for name, model in variants.items()}
    seconds = interleave(steps, device=ids.device, warmup=0, before=before, **how)
    if len(seconds["frozen"].samples) % 2:
        for change_back in before.values():
            change_back()
    return seconds, {"peak_memory": peak, "saved": saved, "copies": copies}


def make_prompt(model: nn.Module, tokenizer: Tokenizer | None) -> dict[str, Tensor]:
    """A question, in the tokenizer's chat format if it has one; without a tokenizer 32 random tokens."""
    if tokenizer is None:
        ids = random_ids(model, 1, 32)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    text = QUESTION
    if tokenizer.chat_template:
        message = {"role": "user", "content": QUESTION}
        text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    return dict(tokenizer(text, return_tensors="pt", return_token_type_ids=False).to(model.device))


def generate(model: nn.Module, prompt: dict[str, Tensor], new_tokens: int) -> Tensor:
    """Exactly `new_tokens` greedy tokens after the first row of `prompt`: [new_tokens] int64."""
    output = model.generate(**prompt, do_sample=False, min_new_tokens=new_tokens, max_new_tokens=new_tokens)
    return output[0, prompt["input_ids"].shape[1] :]


def measure_generation(
    variants: dict[str, nn.Module], tokenizer: Tokenizer | None, *, batch: int = 1, new_tokens: int, **how: Any
) -> tuple[dict[str, Timing], dict]:
    """Times of a generation by variant (prefill included; `batch` rows of the same prompt), and what they agree on.

    "same_tokens" counts the tokens before the first in which gci and eager differ; later tokens follow different
    texts. `how` goes to :func:`.timing.interleave`.
    """
    calls = generations(variants, tokenizer, batch=batch, new_tokens=new_tokens)
    written = {name: call() for name, call in calls.items()}
    agreement = {
        "same_tokens": int((written["gci"] == written["eager"]).cumprod(0).sum()),
        "of": new_tokens,
        "texts": {name: tokenizer.decode(ids) for name, ids in written.items()} if tokenizer else None,
    }
    return interleave(calls, device=variants["frozen"].device, warmup=0, **how), agreement


def generations(
    variants: dict[str, nn.Module], tokenizer: Tokenizer | None, *, batch: int, new_tokens: int
) -> dict[str, Callable[[], Tensor]]:
    """The calls that :func:`measure_generation` times, by variant; each sets its model to evaluation mode."""
    prompt = {name: tensor.expand(batch, -1) for name, tensor in make_prompt(variants["frozen"], tokenizer).items()}
    return {name: lambda model=model: generate(model.eval(), prompt, new_tokens) for name, model in variants.items()}
