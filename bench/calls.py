"""How many Python functions one call of an adapted layer enters: `python -m bench.calls` prints a table.

The layer is the MLP's last projection, 64 x 64, of the second layer of a Llama of two, on the CPU in float32, and gets
four tokens:

- training forward: one sequence of four tokens in training mode; the input and the adapter ask for gradients;
- decoding step: one new token for each of four sequences with a cache, under torch.no_grad, in evaluation mode.

The numbers are those of the fourth such call: what is prepared once, or by the first layer of a forward, is prepared by
then, and the cache has room. Counted are

- calls: every Python function entered on this thread from `layer(x)` on, `nn.Module.__call__` and PyTorch's own
  functions included, functions written in C or C++ not. A generator counts each time that it is resumed;
  comprehensions and generator expressions are part of the function around them;
- changes of file: how often the next function entered is in another file than the one entered before it.

`--list` prints the functions too.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FrameType

import torch
from peft import LoraConfig, PeftConfig
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import gci_kernels

SIZE, TOKENS, WARMUP = 64, 4, 3
LAYER = "model.layers.1.mlp.down_proj"


@dataclass(frozen=True)
class Calls:
    """What one call of a layer enters: the code of every Python function, in order."""

    entered: list[CodeType]

    @property
    def count(self) -> int:
        """The number of functions."""
        return len(self.entered)

    @property
    def file_changes(self) -> int:
        """How often a function is in another file than the function before it."""
        files = [code.co_filename for code in self.entered]
        return sum(before != after for before, after in zip(files, files[1:], strict=False))


def configs() -> dict[str, PeftConfig]:
    """A config of every method, by its name in lower case: that of LoRA, the registered methods' examples, LoKI's."""
    found: dict[str, PeftConfig] = {"lora": LoraConfig(r=4)}
    found |= {name.lower(): copy.copy(method.example) for name, method in gci_kernels.METHODS.items()}
    for config in found.values():
        config.target_modules = {"down_proj"}
    return found | {"loki": gci_kernels.LoKIConfig(positions={LAYER: [1, 5, 9]})}


def adapted_model(method: str) -> nn.Module:
    """A patched Llama of two layers with an adapter of `method`, a key of :func:`configs`."""
    config = LlamaConfig(
        vocab_size=32, hidden_size=SIZE, intermediate_size=SIZE, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    return gci_kernels.patch(LlamaForCausalLM(config), configs()[method])


def training_forward(model: nn.Module) -> Callable[[], object]:
    """A forward of one sequence with gradients, to be called repeatedly."""
    embeddings = torch.ones(1, TOKENS, SIZE, requires_grad=True)
    model.train()
    return lambda: model(inputs_embeds=embeddings, use_cache=False)


def decoding_step(model: nn.Module) -> Callable[[], object]:
    """A forward of one token a sequence, without gradients and with a growing cache, to be called repeatedly."""
    ids, cache = torch.ones(TOKENS, 1, dtype=torch.long), DynamicCache()
    model.eval()

    @torch.no_grad()
    def step() -> None:
        model(input_ids=ids, past_key_values=cache, use_cache=True)

    return step


def record(layer: nn.Module, run: Callable[[], object]) -> Calls:
    """What the call of `layer` enters while `run` runs.

    Raises:
        ValueError: `run` does not call the layer exactly once.
    """
    entered: list[CodeType] = []
    call: FrameType | None = None
    times = 0

    def profile(frame: FrameType, event: str, _: object) -> None:
        nonlocal call, times
        code = frame.f_code
        if event == "call":
            if code is nn.Module.__call__.__code__ and frame.f_locals["self"] is layer:
                call, times = frame, times + 1
            if call is not None and (not code.co_name.startswith("<") or code.co_name == "<lambda>"):
                entered.append(code)
        elif event == "return" and frame is call:
            call = None

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    if times != 1:
        raise ValueError(f"the layer was called {times} times, not once")
    return Calls(entered)


def measure(method: str, situation: Callable[[nn.Module], Callable[[], object]]) -> Calls:
    """What a layer with an adapter of `method` enters in a `situation`: training_forward or decoding_step."""
    model = adapted_model(method)
    run = situation(model)
    for _ in range(WARMUP):
        run()
    return record(model.get_submodule(f"base_model.model.{LAYER}"), run)


def main() -> None:
    """Prints the counts of all methods."""
    parser = argparse.ArgumentParser(prog="python -m bench.calls", description="Python calls of an adapted layer")
    parser.add_argument("--list", action="store_true", help="print the functions too")
    args = parser.parse_args()
    console = Console(soft_wrap=True)
    table = Table("method", "call", "Python calls", "changes of file")
    for method in configs():
        for situation in (training_forward, decoding_step):
            calls, name = measure(method, situation), situation.__name__.replace("_", " ")
            table.add_row(method, name, str(calls.count), str(calls.file_changes))
            for code in calls.entered if args.list else ():
                place = f"{code.co_filename}:{code.co_firstlineno} {code.co_name}"
                console.print(f"{method}, {name}: {place}", markup=False, highlight=False)
    console.print(table)


if __name__ == "__main__":
    main()
