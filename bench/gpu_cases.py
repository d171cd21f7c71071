"""What `python -m bench.gpu` times: single stages, adapted layers, a few layers of a model; each is checked first.

A step is a generator of measurements: names, each with what measures its entry, a dictionary that JSON can hold. An
entry that failed has "error" in place of times; a variant that failed, or that cannot run here, is named with the
reason in its entry's "left_out".
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from gci_kernels.hardware import Shape
from gci_kernels.ops.bottleneck import choose_plan
from gci_kernels.ops.row_linear import choose_form
from gci_kernels.proof.verify import obstacle

from . import gpu_decode, gpu_plans
from .baselines import shared_copy
from .cases import (
    METHODS,
    LayerCase,
    LayerInputs,
    LayerVariant,
    RowCase,
    eager_variant,
    floor_of,
    frozen_variant,
    gci_variant,
    layer_shape,
    make_case,
    make_inputs,
    registered_methods,
)
from .correctness import check_layer, check_model
from .gpu_stages import FORMS, Entry, Measurement, stage_measurements
from .models import RANDOM_LLAMAS, random_llama
from .timing import Timing, cold_cache, interleave, peak_memory
from .variants import model_variants, random_ids, train_step, training_loss

MAIN_METHODS = ("lora", "loramoe")  # of the others only the essential is timed


@dataclass(frozen=True)
class Sizes:
    """What is measured; `compiler` is the torch.compile backend of the baseline."""

    features: int
    wide: int  # out features of the second layer that is timed
    tokens: int
    fewer_tokens: int
    llama: dict[str, int]
    slices: tuple[tuple[int, int, int], ...]  # layers, batch, seq
    decode: gpu_decode.Sizes
    gate_seq: int  # tokens of the check of a slice: enough for the plan that is timed
    rounds: int
    compiler: str


_LLAMA = RANDOM_LLAMAS["8b"] | {"vocab_size": 4096}
_DECODE = gpu_decode.Sizes(
    _LLAMA | {"num_hidden_layers": 4}, {"lora": 128, "loramoe": 128, "alora": 4096},
    compiled=("loramoe", "alora", "lora"), steps=8, rounds=15, compiler="inductor",
)  # fmt: skip
FULL = Sizes(
    features=4096, wide=14336, tokens=8192, fewer_tokens=2048, llama=_LLAMA,
    slices=((1, 1, 8192), (4, 4, 2048)), decode=_DECODE, gate_seq=640, rounds=15, compiler="inductor",
)  # fmt: skip
_QUICK_DECODE = gpu_decode.Sizes(
    RANDOM_LLAMAS["tiny"], dict.fromkeys(gpu_decode.REQUIRED, 12), ("alora",), steps=2, rounds=2, compiler="eager"
)
#: For testing the command: every line runs, the numbers mean nothing.
QUICK = Sizes(
    features=64, wide=96, tokens=96, fewer_tokens=33, llama=RANDOM_LLAMAS["tiny"], slices=((2, 1, 32),),
    decode=_QUICK_DECODE, gate_seq=32, rounds=2, compiler="eager",
)  # fmt: skip


def shapes(sizes: Sizes) -> list[Shape]:
    """The layers whose stages are timed, by themselves or in a layer."""
    widths = (sizes.features, sizes.wide)
    main = [layer_shape(method, sizes.tokens, sizes.features, width) for width in widths for method in MAIN_METHODS]
    return [*main, layer_shape("loki", sizes.tokens, sizes.features, sizes.features)]


def stages(sizes: Sizes, device: torch.device) -> Iterator[Measurement]:
    """Every stage by itself in bfloat16, Triton against the library; then with dropout, and with float32 adapters."""
    for form in FORMS:
        for method in (*MAIN_METHODS, *(() if form else ("loki",))):
            shape = layer_shape(method, sizes.tokens, sizes.features, sizes.features)
            yield from stage_measurements(method, shape, torch.bfloat16, device, sizes.rounds, form)


def layers(sizes: Sizes, device: torch.device) -> Iterator[Measurement]:
    """Forward and backward of one adapted layer. What is worth most comes first, and what torch compiles last."""
    for case in _layer_cases(sizes):
        adapter = "" if case.adapter_dtype == case.dtype else ", float32 adapter"
        yield f"{case.name}{adapter}", partial(_layer, case, device, sizes.rounds, partial(_planned, device=device))
    for case in _main_cases(sizes):
        yield f"{case.name}, compiled", partial(_layer, case, device, sizes.rounds, partial(_compiled_layer, sizes))


def _main_cases(sizes: Sizes) -> list[LayerCase]:
    """In bfloat16, as attention's and the MLP's first projections have them."""
    widths = (sizes.features, sizes.wide)
    shapes = [(method, sizes.tokens, sizes.features, width) for width in widths for method in MAIN_METHODS]
    return [make_case(*shape, torch.bfloat16) for shape in shapes]


def _layer_cases(sizes: Sizes) -> list[LayerCase]:
    """Then every other method; fewer tokens; adapters in float32; and other dtypes throughout."""
    square, bfloat16 = (sizes.features, sizes.features), torch.bfloat16
    others = [method for method in METHODS if method not in MAIN_METHODS]
    return [
        *_main_cases(sizes),
        *(make_case(method, sizes.tokens, *square, bfloat16) for method in others),
        *(make_case(method, sizes.fewer_tokens, *square, bfloat16) for method in MAIN_METHODS),
        make_case("lora", sizes.tokens, *square, bfloat16, torch.float32),
        *(make_case("loramoe", sizes.tokens, *square, dtype) for dtype in (torch.float16, torch.float32)),
    ]


Variants = dict[str, Callable[[], LayerVariant]]


def _planned(inputs: LayerInputs, eager: LayerVariant, case: LayerCase, device: torch.device) -> Variants:
    """What "auto" takes, and every plan that it might take."""
    if isinstance(case, RowCase):
        return {f"gci {impl}": partial(gci_variant, inputs, impl) for impl in ("auto", "aten", "triton")}
    plans = gpu_plans.plans(case, device)
    made: Variants = {"gci auto": partial(gci_variant, inputs)}
    return made | {f"gci {name}": partial(gpu_plans.planned_variant, inputs, *how) for name, how in plans.items()}


def _compiled_layer(sizes: Sizes, inputs: LayerInputs, eager: LayerVariant, case: LayerCase) -> Variants:
    """The eager layer compiled by torch, and ours beside it."""
    compiled = partial(torch.compile, eager.forward, backend=sizes.compiler)
    return {"gci auto": partial(gci_variant, inputs), "compiled": lambda: replace(eager, forward=compiled())}


def _layer(case: LayerCase, device: torch.device, rounds: int, make_all: Callable[..., Variants]) -> Entry:
    inputs = make_inputs(case, device)
    eager = eager_variant(inputs)
    variants, errors, left_out = {"frozen": frozen_variant(inputs), "eager": eager}, {}, {}
    for name, make in make_all(inputs, eager, case).items():
        reason = obstacle("triton", device.type, case.dtype) if "triton" in name else None
        if reason is None:
            try:
                variant = make()
                errors[name] = check_layer(inputs, {"eager": eager, "gci": variant})
                variants[name] = variant
            except Exception as error:  # this variant is reported as left out, and the others are timed
                reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            left_out[name] = reason
    fns = {name: variant.step for name, variant in variants.items()}
    before = {name: variant.change for name, variant in variants.items()}
    seconds = interleave(fns, device=device, rounds=rounds, warmup=2, before=before, prepare=cold_cache(device))
    return {
        "method": case.method,
        "tokens": case.tokens,
        "features": [case.in_features, case.out_features],
        "dtype": str(case.dtype).removeprefix("torch."),
        "adapter_dtype": str(case.adapter_dtype).removeprefix("torch."),
        "plan": _plan(case, device),
        "floor_seconds": floor_of(case, device),
        "errors": errors,
        "left_out": left_out,
        **compare(seconds),
    }


def _plan(case: LayerCase, device: torch.device) -> str:
    """The plan that "auto" takes."""
    tokens, dtype = case.tokens, case.dtype
    if isinstance(case, RowCase):
        share = case.rows / case.out_features
        form = choose_form("auto", tokens=tokens, dtype=dtype, device_type=device.type, share=share, keep=True)
        return f"rows={form}"
    mixer = "identity" if case.method == "lora" else registered_methods()[case.method].mixer.name
    return str(choose_plan("auto", tokens=tokens, dtype=dtype, device_type=device.type, mixer=mixer))


def compare(seconds: dict[str, Timing]) -> Entry:
    """The times, and their ratios to the frozen base, round by round."""
    taxes = {name: asdict(timing / seconds["frozen"]) for name, timing in seconds.items() if name != "frozen"}
    return {"seconds": {name: asdict(timing) for name, timing in seconds.items()}, "tax": taxes}


def slices(sizes: Sizes, device: torch.device) -> Iterator[Measurement]:
    """Train steps of a few layers of a Llama with random weights, bfloat16, adapters on gate, up and down."""
    for number, batch, seq in sizes.slices:
        for method in MAIN_METHODS:
            name = f"{method}, {number} layer{'s' if number > 1 else ''}, batch {batch}x{seq}"
            shape = sizes.llama | {"num_hidden_layers": number}
            yield name, partial(_slice, shape, method, batch, seq, sizes, device)


def _slice(shape: dict[str, int], method: str, batch: int, seq: int, sizes: Sizes, device: torch.device) -> Entry:
    model = random_llama(shape, torch.bfloat16, device)
    variants = model_variants(model, method)
    gci = variants.pop("gci")
    variants |= {"compiled": _compiled(variants["eager"], sizes.compiler), "gci": gci}
    ids, errors, left_out, peak = random_ids(model, batch, seq), {}, {}, {}
    steps = {name: partial(train_step, model, ids) for name, model in variants.items()}
    for name in list(steps):
        try:
            if name == "compiled":
                _check_baseline(variants["eager"], variants["compiled"], ids)
            if name == "gci":
                errors = check_model(variants, random_ids(model, 3, sizes.gate_seq))
            steps[name]()  # all is compiled before memory and time are measured
            peak[name] = peak_memory(steps[name], device)
        except Exception as error:
            if name == "frozen":
                raise
            left_out[name] = f"{type(error).__name__}: {error}"
            del steps[name]
    seconds = interleave(steps, device=device, rounds=max(2, sizes.rounds // 2), warmup=1)
    return {
        "method": method,
        "layers": shape["num_hidden_layers"],
        "tokens": ids.numel(),
        "peak_memory": peak,
        "errors": errors,
        "left_out": left_out,
        "tokens_per_second": {name: asdict(timing.rate(ids.numel())) for name, timing in seconds.items()},
        **compare(seconds),
    }


def _compiled(eager: nn.Module, backend: str) -> nn.Module:
    """A copy whose decoder layers are compiled one by one, so that equal layers share one graph."""
    model = shared_copy(eager)
    for layer in model.modules():
        if isinstance(layer, LlamaDecoderLayer):
            layer.compile(backend=backend, dynamic=False)
    return model


def _check_baseline(eager: nn.Module, compiled: nn.Module, ids: Tensor) -> None:
    """AssertionError where the compiled model's loss differs from eager's in the first half of bfloat16's digits."""
    expected, actual = (float(training_loss(model, ids)) for model in (eager, compiled))
    bound = torch.finfo(torch.bfloat16).eps ** 0.5
    if not abs(actual - expected) <= bound * abs(expected):
        raise AssertionError(f"the compiled model's loss is {actual}, eager's {expected}")
