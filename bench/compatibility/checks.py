"""The checks of a method in a model, and the reasons they give when they fail."""

import copy
import linecache
import re
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.config import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

import gci_kernels
from gci_kernels import ALoRAConfig, LoKIConfig, LoRAMoEConfig
from gci_kernels.accuracy import relative_error

from .inputs import NEW_TOKENS, Inputs, candidates
from .plain import is_linear, plain_model, start_sequence
from .table import ANYWAY, FAILS, REFUSED, YES

TOLERANCE = 1e-4  # for float32, through a few layers
GRADIENT_TOLERANCE = 1e-3  # attention without scaled scores loses one more digit
EFFECT = 1e-5  # a smaller change is rounding; an adapter in a router changes little more

Make = Callable[[PreTrainedModel], PeftConfig]

# Of each bottleneck method the class of its configs, its sizes, and what "all-linear but some" leaves out by name.
SIZES: dict[str, tuple[Any, dict[str, int], list[str]]] = {
    "lora": (LoraConfig, {"r": 4}, ["out_proj"]),
    "loramoe": (LoRAMoEConfig, {"r": 2, "num_experts": 4}, []),
    "alora": (ALoRAConfig, {"r": 4, "num_heads": 2}, []),
}


class Difference(Exception):
    """A result differs from the reference, or the adapter has no effect."""


@dataclass(frozen=True)
class Results:
    """What is compared of a model: logits, gradients of trained parameters by name, and generated tokens."""

    logits: Tensor
    gradients: dict[str, Tensor]
    tokens: Tensor


def check_base(model: PreTrainedModel) -> tuple[str, Inputs]:
    """The name and the tensors of inputs with which the plain model's forward, backward and generate() work.

    Raises:
        Exception: the reason why the last inputs that were tried do not work.
    """
    model.get_input_embeddings()  # PEFT asks for them
    for name, inputs in candidates(model):
        try:
            first = logits_of(model, inputs)
            if not torch.isfinite(first).all():
                raise Difference("the model's logits are not finite")
            if relative_error(logits_of(model, inputs), first) > TOLERANCE / 10:
                raise Difference("the model's logits differ between calls")
            if "pixel_values" in inputs:
                other = inputs | {"pixel_values": inputs["pixel_values"].flip(-1)}
                if relative_error(logits_of(model, other), first) < EFFECT:
                    raise Difference("the image makes no difference")
            if results(model, inputs).tokens.shape[-1] > inputs["input_ids"].shape[-1] + 1 + NEW_TOKENS:
                raise Difference("generate() gives more tokens than it was asked for")
            return name, inputs
        except Exception as error:
            failed = error
    raise failed


def check(base: PreTrainedModel, inputs: Inputs, method: str) -> dict[str, str]:
    """Checks `method` in copies of `base`: its "outcome" and "targets" and, where it is not "yes", the reason "why"."""
    found: dict[str, str] = {}
    for targets, make in configs(method).items():
        run = _Run(base, inputs, method, make)
        try:
            run.all()
            return {"outcome": YES, "targets": targets}
        except Exception as error:
            outcome = ANYWAY if run.stage == "reference" else REFUSED if _is_refusal(error) else FAILS
            latest = {"outcome": outcome, "targets": targets, "why": _reason(error, run.stage)}
            if not found or found["outcome"] == FAILS:
                found = latest
            # Other targets may work where patching fails; a failure in a patched model counts in any case.
            if outcome == FAILS and run.stage != "patch":
                return latest
    return found


def configs(method: str) -> dict[str, Make]:
    """The configs to try, by the name of their targets: the method's default first, then those for every model."""
    if method == "loki":
        return {
            "default": lambda model: LoKIConfig(positions={0: [1, 5, 9], 1: [0, 3]}),
            "by name": lambda model: LoKIConfig(positions=_last_linears(model)),
        }
    cls, sizes, excluded = SIZES[method]
    everywhere = partial(cls, **sizes, target_modules="all-linear")
    default = {} if method == "lora" else {"default": lambda model: cls(**sizes)}
    return {
        **default,
        "all-linear": lambda model: everywhere(),
        "all-linear but some": lambda model: everywhere(exclude_modules=[*excluded, *_derived(model)]),
    }


def _derived(model: PreTrainedModel) -> list[str]:
    """Names of layers derived from nn.Linear that compute something else, such as routers that return a tuple."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return [name for name, each in linears.items() if type(each).forward is not nn.Linear.forward]


def _last_linears(model: PreTrainedModel) -> dict[str, list[int]]:
    """Three rows of the last linear layer of each decoder layer, routers left out."""
    decoder = model.get_decoder()
    inside = set((decoder if isinstance(decoder, PreTrainedModel) else model).modules())
    found: dict[str, tuple[str, int]] = {}
    for name, module in model.named_modules():
        block = re.match(r"(.*?\.\d+)\.", name)
        if block and module in inside and is_linear(module):
            size = module.weight.shape[0] if isinstance(module, nn.Linear) else module.nf
            if size >= 16:
                found[block[1]] = (name, size)
    return {name: sorted({0, size // 2, size - 1}) for name, size in found.values()}


class _Run:
    """The checks of one method in one model; `stage` is the name of the present one."""

    def __init__(self, base: PreTrainedModel, inputs: Inputs, method: str, make: Make) -> None:
        self.base, self.inputs, self.method, self.make, self.stage = base, inputs, method, make, "patch"

    def all(self) -> None:
        wanted = self._by_peft() if self.method == "lora" else None
        self.stage = "patch"
        patched = gci_kernels.patch(copy.deepcopy(self.base), self.make(self.base)).eval()
        randomize(patched)
        if wanted is None:
            wanted = self._by_formula(patched)
        self.stage = "forward"
        _same("logits", logits_of(patched, self.inputs), wanted.logits)
        if relative_error(logits_of(self.base, self.inputs), wanted.logits) < EFFECT:
            raise Difference("the adapter has no effect")
        self.stage = "backward"
        _same_gradients(gradients_of(patched, self.inputs), wanted.gradients)
        self.stage = "generate"
        tokens = tokens_of(patched, self.inputs)
        if not torch.equal(tokens, wanted.tokens):
            raise Difference(f"other tokens: {tokens.tolist()} instead of {wanted.tokens.tolist()}")
        self._check_saved(patched, wanted)
        self._check_unpatched(patched)

    def _by_peft(self) -> Results:
        """The results of PEFT's own layers."""
        self.stage = "reference"
        model: Any = get_peft_model(copy.deepcopy(self.base), self.make(self.base)).eval()
        randomize(model)
        wanted = results(model, self.inputs)
        _same("logits after saving and loading", logits_of(self._saved(model), self.inputs), wanted.logits)
        return wanted

    def _saved(self, model: Any) -> PeftModel:
        """The adapter, saved and loaded into another copy of the base model."""
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            return PeftModel.from_pretrained(copy.deepcopy(self.base), folder).eval()

    def _by_formula(self, patched: nn.Module) -> Results:
        """The results of plain layers. Where they fail, the patched model may refuse with the reason."""
        self.stage = "reference"
        try:
            return results(plain_model(self.base, patched).eval(), self.inputs)
        except Exception as error:
            try:
                results(patched, self.inputs)
            except Exception as own:
                if _is_refusal(own):
                    self.stage = "forward"
                    raise
            raise error

    def _check_saved(self, patched: Any, wanted: Results) -> None:
        """Saves and loads the adapter; LoRA's is loaded by PEFT alone, then patched and unpatched."""
        self.stage = "save and load"
        loaded = self._saved(patched)
        own = logits_of(loaded, self.inputs)
        _same("logits", own, wanted.logits)
        if self.method == "lora":
            gci_kernels.patch(loaded)
            _same("logits", logits_of(loaded, self.inputs), wanted.logits)
            self.stage = "unpatch"
            gci_kernels.unpatch(loaded)
            if not torch.equal(logits_of(loaded, self.inputs), own):
                raise Difference("the logits of PEFT's layers differ from those before")

    def _check_unpatched(self, patched: nn.Module) -> None:
        self.stage = "unpatch"
        plain = gci_kernels.unpatch(patched.eval())
        kinds = [[(name, type(module)) for name, module in each.named_modules()] for each in (plain, self.base)]
        states = [each.state_dict() for each in (plain, self.base)]
        if kinds[0] != kinds[1] or states[0].keys() != states[1].keys():
            raise Difference("modules or parameters differ from those before")
        changed = [name for name, value in states[0].items() if not torch.equal(value, states[1][name])]
        if changed:
            raise Difference(f"changed: {', '.join(changed)}")
        if not torch.equal(logits_of(plain, self.inputs), logits_of(self.base, self.inputs)):
            raise Difference("the model's logits differ from those before")


def _same(what: str, actual: Tensor, wanted: Tensor) -> None:
    error = relative_error(actual, wanted)
    if not error <= TOLERANCE:
        raise Difference(f"{what} differ by {error:.1e}")


def _same_gradients(actual: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    if actual.keys() != wanted.keys():
        raise Difference(f"trained parameters differ: {sorted(actual.keys() ^ wanted.keys())[:2]}")
    largest = max((float(gradient.norm()) for gradient in wanted.values()), default=0.0)
    if not largest > 1e-3:
        raise Difference("the adapter gets no gradient")
    for name, gradient in wanted.items():
        # A gradient much smaller than the others may consist of rounding errors.
        error = float((actual[name] - gradient).norm()) / max(float(gradient.norm()), 1e-2 * largest)
        if not error <= GRADIENT_TOLERANCE:
            raise Difference(f"the gradient of {name} differs by {error:.1e}")


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Gives all trained parameters random values, so that the adapter has an effect."""
    generator = torch.Generator().manual_seed(3)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.5 * noise / max(parameter.shape[-1], 8) ** 0.5)


def results(model: nn.Module, inputs: Inputs) -> Results:
    """Everything that is compared, of a model in evaluation mode."""
    return Results(logits_of(model, inputs), gradients_of(model, inputs), tokens_of(model, inputs))


def _forward(model: nn.Module, inputs: Inputs) -> Tensor:
    torch.manual_seed(0)
    start_sequence(model)
    output = model(**inputs)
    return output.logits if "logits" in output else output[0]


def logits_of(model: nn.Module, inputs: Inputs) -> Tensor:
    """The logits [batch, tokens, vocabulary], without gradient."""
    with torch.no_grad():
        return _forward(model, inputs)


def gradients_of(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """The gradients of trained parameters in training mode, by the parameters' names in the base model.

    They are zero where a parameter takes no part.
    """
    model.train()
    try:
        logits = _forward(model, inputs)
        direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4))
        model.zero_grad()
        (logits * direction).sum().backward()
    finally:
        model.eval()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {
        name.removeprefix("base_model.model."): torch.zeros_like(parameter)
        if parameter.grad is None
        else parameter.grad
        for name, parameter in trained.items()
    }


def tokens_of(model: nn.Module, inputs: Inputs) -> Tensor:
    """The tokens [batch, tokens] that greedy generation returns."""
    torch.manual_seed(0)
    start_sequence(model)
    given = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    made: Any = model.generate(
        **given, do_sample=False, num_beams=1, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS
    )
    return made if isinstance(made, Tensor) else made.sequences


def _is_refusal(error: Exception) -> bool:
    """Whether this package raised the exception on purpose."""
    if isinstance(error, Difference):
        return False
    frame = traceback.extract_tb(error.__traceback__)[-1]
    own = Path(frame.filename).is_relative_to(Path(gci_kernels.__file__).parent)
    return own and linecache.getline(frame.filename, frame.lineno or 0).strip().startswith("raise ")


def _reason(error: Exception, stage: str) -> str:
    """The error in one line, with the stage and, where this package did not raise it on purpose, its type."""
    text = " ".join(str(error).split())
    if not isinstance(error, Difference) and not _is_refusal(error):
        text = f"{type(error).__name__}: {text}"
    return f"{stage}: {text}"[:500]
