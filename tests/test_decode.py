"""Decoding steps: the C++ kernel against float64, steps that are found again, and layers that take them."""

import copy
import gc
import os
import subprocess
import sys
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from gci_kernels import ALoRAConfig, LoRAMoEConfig, ops, patch
from gci_kernels.native import DTYPE_CODES, extension
from gci_kernels.ops.decode import MAX_TOKENS, add_update, choose_decode, step
from gci_kernels.testing import error_bound, relative_error
from gci_kernels.tuners import ALoRALinear, FusedLoraLinear, LoRAMoELinear, fusion

pytestmark = pytest.mark.usefixtures("poisoned")

PAIRS = [
    (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16), (torch.float16, torch.float32),
]  # fmt: skip
# tokens, in, out, rank, experts (0: LoRA), top_k
CASES = [
    (1, 67, 45, 16, 0, 0), (1, 576, 130, 4, 8, 8), (2, 33, 20, 3, 5, 2), (3, 64, 64, 40, 0, 0), (5, 1, 1, 1, 1, 1),
    (7, 130, 77, 8, 0, 0), (8, 96, 200, 4, 6, 6), (16, 257, 96, 16, 2, 1), (16, 31, 300, 1, 256, 3),
    (4, 40, 35, 500, 0, 0),
]  # fmt: skip


def make(tokens, in_features, out_features, rank, experts, dtype, adapter_dtype, seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0, dtype=adapter_dtype):
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype)

    width = rank * max(experts, 1)
    x = draw(tokens, in_features, dtype=dtype)
    A = draw(width, in_features, scale=in_features**-0.5)
    router = draw(experts, in_features, scale=in_features**-0.5) if experts else None
    return x, A, router, draw(out_features, width, scale=width**-0.5), draw(tokens, out_features, dtype=dtype)


def expected(x, A, router, B, y, top_k, scaling=2.0):
    """By the reference, in the dtype of its arguments."""
    if router is None:
        return y + ops.lora_linear(x, None, None, A, B, scaling=scaling, impl="reference")
    return y + ops.loramoe_linear(x, None, None, A, B, router, scaling=scaling, top_k=top_k, impl="reference")[0]


def double(*tensors):
    return [t if t is None else t.double() for t in tensors]


@pytest.mark.parametrize(("dtype", "adapter_dtype"), PAIRS, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case, dtype, adapter_dtype):
    *shape, top_k = case
    x, A, router, B, y = make(*shape, dtype, adapter_dtype)
    truth = expected(*double(x, A, router, B, y), top_k)
    plain = expected(x, *(t if t is None else t.to(dtype) for t in (A, router, B)), y, top_k)
    plain_truth = expected(*double(x, *(t if t is None else t.to(dtype) for t in (A, router, B)), y), top_k)
    results = []
    for _ in range(2):
        actual = y.clone()
        assert add_update(actual, x, A, router, B, scaling=2.0, top_k=top_k)
        results.append(actual)
    assert torch.equal(*results)
    bound = error_bound(relative_error(plain, plain_truth), dtype)
    assert relative_error(results[0], truth) <= bound


def test_every_instruction_set(tmp_path):
    """Each in a process of its own: the extension chooses once."""
    for isa in ("baseline", "avx2", "avx512", "avx512bf16"):
        environment = os.environ | {"GCI_CPU_ISA": isa}
        probe = [sys.executable, "-c", "from gci_kernels import native; native.extension().isa()"]
        if subprocess.run(probe, env=environment, cwd=tmp_path, capture_output=True).returncode:
            assert isa != "baseline"
            continue
        if extension().isa() == isa:
            continue
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            __file__,
            "-k",
            "float64 or half",
        ]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{isa}: {done.stdout}"


@pytest.mark.parametrize("threads", (1, 2, 5))
def test_groups_of_tokens_with_adapters_of_their_own(threads):
    """Tokens in no order, adapters of every kind and size; the rows of other tokens stay."""
    in_features, out_features, rows = 70, 53, [4, 0, 6, 2, 5]
    kinds = [(4, 0, 0, rows[:1]), (3, 4, 2, rows[1:3]), (16, 0, 0, rows[3:])]
    x, y = torch.randn(8, in_features), torch.randn(8, out_features)
    groups, wanted, first, kept = [], y.clone(), 0, []
    for seed, (rank, experts, top_k, mine) in enumerate(kinds):
        _, A, router, B, _ = make(1, in_features, out_features, rank, experts, torch.float32, torch.float32, seed)
        kept.append((A, router, B))
        address = 0 if router is None else router.data_ptr()
        groups.append((A.data_ptr(), address, B.data_ptr(), rank, experts, top_k, 0.5 + seed, first, len(mine)))
        first += len(mine)
        wanted[mine] = expected(x[mine], A, router, B, y[mine], top_k, 0.5 + seed)
    run = extension().DecodeStep(0, 0, in_features, out_features, rows, groups)
    workspace = torch.empty(5 * (in_features + 40), dtype=torch.float32)
    run(x.data_ptr(), in_features, y.data_ptr(), out_features, workspace.data_ptr(), threads)
    assert relative_error(y, wanted) < 1e-6
    with pytest.raises(ValueError, match="at most 16 tokens"):
        extension().DecodeStep(0, 0, 4, 4, list(range(17)), [])


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_values_are_rounded_as_torch_rounds_them(dtype):
    """Every value goes through the kernel unchanged, and sums are rounded to the nearest, ties to even."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()].contiguous()
    y, one = every.clone()[None], torch.ones(1, 1, dtype=dtype)
    assert add_update(y, one, torch.zeros(1, 1), None, torch.zeros(every.numel(), 1), scaling=1.0)
    assert torch.equal(y[0], every + 0.0)
    ties = 1 + torch.arange(64) * (torch.finfo(dtype).eps / 2)
    wide = torch.cat(
        (torch.linspace(-70000, 70000, 4001), torch.logspace(-9, 5, 4001), ties, torch.tensor([65519.9, 65520]))
    )
    y, B = torch.zeros(1, wide.numel(), dtype=dtype), wide[:, None].contiguous()
    assert add_update(y, one, torch.ones(1, 1), None, B, scaling=1.0)
    assert torch.equal(y[0], wide.to(dtype))


@pytest.mark.parametrize(("dtype", "adapter_dtype"), PAIRS, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("segmented", (False, True))
@pytest.mark.parametrize(
    ("batch", "past", "in_features", "rank", "heads", "residual"),
    [(1, 0, 20, 4, 1, False), (3, 7, 67, 16, 4, True), (2, 130, 33, 12, 4, False), (16, 40, 64, 32, 2, True),
     (1, 300, 576, 64, 2, False), (5, 1, 9, 1, 1, True)],
)  # fmt: skip
def test_attention_of_a_new_token(batch, past, in_features, rank, heads, residual, segmented, dtype, adapter_dtype):
    """Against alora_linear with the same past; the cache holds NaN where nothing is seen, and behind its end."""
    x, A, _, B, y = make(batch, in_features, 45, rank, 0, dtype, adapter_dtype)
    qkv = (torch.randn(3 * rank, rank) * rank**-0.5).to(adapter_dtype)
    kv = torch.full((batch, past + 5, 2 * rank), float("nan"), dtype=dtype)
    kv[:, :past] = torch.randn(batch, past, 2 * rank)
    segments = None
    if segmented:
        segments = torch.ones(batch, past + 1, dtype=torch.int32)
        for row in range(batch):
            segments[row, : past * row // batch] = -1 if row % 2 else 0
        if batch > 2:
            segments[2] = -1  # its new token is padding
    clean = kv[:, :past].clone()
    if segmented:
        kv[:, :past][(segments[:, :past] != segments[:, -1:])] = float("nan")

    def reference(dtype, clean):
        cast = [t.to(adapter_dtype if dtype == torch.float64 else dtype).to(dtype) for t in (A, qkv, B)]
        update, new = ops.alora_linear(
            x.to(dtype)[:, None], None, None, *cast, num_heads=heads, scaling=2.0, residual=residual,
            past=clean.to(dtype), sequence=ops.Sequence(segments, past), impl="reference",
        )  # fmt: skip
        return y.to(dtype) + update[:, 0], new[:, 0]

    truth, plain = reference(torch.float64, clean), reference(dtype, clean)
    results = []
    for _ in range(2):
        actual, cache = y.clone(), kv.clone()
        step.find_step(x, A, None, B, scaling=2.0).attend(
            actual, x, qkv, cache, past, segments, num_heads=heads, residual=residual
        )
        results.append(actual)
    assert torch.equal(*results) and cache[:, past + 1 :].isnan().all()
    for value, plain_value, true_value in zip((actual, cache[:, past]), plain, truth, strict=True):
        bound = error_bound(relative_error(plain_value, true_value), dtype)
        assert relative_error(value, true_value) <= bound


def test_nan_of_a_logit_reaches_the_output():
    x, A, router, B, y = make(2, 20, 9, 2, 4, torch.float32, torch.float32)
    router[3] = float("nan")
    assert add_update(y, x, A, router, B, scaling=1.0, top_k=2) and y.isnan().all()


def test_the_choice_is_a_function_of_sizes_and_dtypes():
    known = dict(tokens=1, columns=40, experts=8, dtype=torch.bfloat16, adapter_dtype=torch.float32, device_type="cpu")
    assert choose_decode(**known) == "native"
    for change in (
        dict(tokens=0), dict(tokens=17), dict(columns=513), dict(experts=257), dict(device_type="meta"),
        dict(dtype=torch.float64, adapter_dtype=torch.float64), dict(dtype=torch.float32, adapter_dtype=torch.bfloat16),
    ):  # fmt: skip
        assert choose_decode(**known | change) is None, change


def test_what_no_kernel_takes_is_left_alone():
    x, A, router, B, y = make(2, 20, 9, 2, 4, torch.float32, torch.float32)
    before = y.clone()
    for changed in (
        dict(x=x.double(), y=y.double()), dict(A=A.t().contiguous().t()), dict(B=B.bfloat16()), dict(y=y.bfloat16()),
        dict(y=y.t().contiguous().t()), dict(x=x.repeat(9, 1)),
    ):  # fmt: skip
        tensors = dict(y=y, x=x, A=A, router=router, B=B) | changed
        assert not add_update(**tensors, scaling=1.0, top_k=4), changed.keys()
    assert torch.equal(y, before)


def test_steps_follow_their_tensors():
    x, A, router, B, y = make(2, 20, 9, 2, 4, torch.float32, torch.float32)

    def check(A, router, B, scaling, top_k):
        actual = y.clone()
        assert add_update(actual, x, A, router, B, scaling=scaling, top_k=top_k)
        assert relative_error(actual, expected(x, A, router, B, y, top_k, scaling)) < 1e-6

    check(A, router, B, 1.0, 4)
    A.data.mul_(2)
    router.data.mul_(2)
    B.data.mul_(2)
    check(A, router, B, 1.0, 4)  # the same memory
    check(A, router, B, 3.0, 4)
    check(A, router, B, 3.0, 2)
    check(A, None, B[:, :8].contiguous(), 1.0, 0)
    A.data = torch.randn(8, 20)
    check(A, router, B, 1.0, 4)
    A = torch.randn(8, 20)
    check(A, router, B, 1.0, 4)
    key = id(B)
    assert key in step._adapters
    del B
    gc.collect()
    assert key not in step._adapters


def test_threads_of_a_program_may_share_an_adapter():
    x, A, router, B, y = make(8, 300, 400, 4, 8, torch.float32, torch.float32)
    want, wrong = expected(x, A, router, B, y, 8, 1.0), []

    def work():
        for _ in range(50):
            actual = y.clone()
            if not add_update(actual, x, A, router, B, scaling=1.0, top_k=8) or relative_error(actual, want) > 1e-6:
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


# Layers


def tiny_llama(dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def adapted(method, dtype=torch.float32, **changes):
    torch.manual_seed(1)
    targets = ["gate_proj", "down_proj", "q_proj"]
    if method == "alora":
        config = ALoRAConfig(r=8, num_heads=2, target_modules=targets, init_weights=False, **changes)
    elif method == "lora":
        config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **changes)
    else:
        config = LoRAMoEConfig(r=4, num_experts=4, target_modules=targets, init_weights=False, **changes)
    return patch(tiny_llama(dtype), config).eval()


@pytest.fixture
def steps(monkeypatch):
    """Whether a kernel added an adapter's update, each time that a layer asked for it."""
    answers = []

    def record(cls):
        own = cls._add_step
        monkeypatch.setattr(cls, "_add_step", lambda *args: answers.append(own(*args)) or answers[-1])

    for cls in (FusedLoraLinear, LoRAMoELinear, ALoRALinear):
        record(cls)
    return answers


IDS = torch.tensor([[5, 17, 80, 3, 41], [8, 2, 36, 62, 8]])


@pytest.mark.parametrize("method", ("lora", "loramoe", "alora"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_generation_takes_steps_and_gives_the_same_tokens(method, dtype, steps, monkeypatch):
    model = adapted(method, dtype)
    generate = dict(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=8, do_sample=False)
    tokens = model.generate(**generate)
    prompt = [False] * 6 if method == "alora" else []  # ten tokens: more than one for each sequence
    assert steps == prompt + [True] * 7 * 6 or steps == [True] * 8 * 6
    with torch.no_grad():
        one = model(IDS[:, :1]).logits  # where ALoRA's new token is its whole past
    monkeypatch.setattr(fusion, "decodes", lambda base, x: False)
    with torch.no_grad():
        assert relative_error(model(IDS[:, :1]).logits, one) < (1e-5 if dtype == torch.float32 else 3e-2)
    if dtype == torch.float32:
        assert torch.equal(model.generate(**generate), tokens)


@pytest.mark.parametrize("method", ("lora", "loramoe"))
def test_several_adapters_add_up(method, steps, monkeypatch):
    model = adapted(method)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    patch(model)
    model.base_model.set_adapter(["default", "other"])
    with torch.no_grad():
        logits = model(IDS[:, :1]).logits
        assert steps == [True] * 12
        monkeypatch.setattr(fusion, "decodes", lambda base, x: False)
        assert relative_error(logits, model(IDS[:, :1]).logits) < 1e-5


@pytest.mark.parametrize("method", ("lora", "loramoe"))
def test_calls_that_are_no_steps(method, steps):
    model = adapted(method)
    model(IDS[:, :1])  # gradients are wanted
    with torch.no_grad():
        model(IDS.repeat(2, 1))  # too many tokens
        with torch.autocast("cpu", torch.bfloat16):
            model(IDS[:, :1])
        for module in model.modules():
            if hasattr(module, "base_layer"):
                module.base_layer.register_forward_hook(lambda *args: None)
        model(IDS[:, :1])
    assert steps == []


def test_where_there_are_no_kernels_the_fused_layer_stays_whole():
    """In float64, and on every device but a CPU."""
    with torch.no_grad():
        for kind in (dict(dtype=torch.float64), dict(device="meta")):
            assert not fusion.decodes(torch.nn.Linear(4, 4, **kind), torch.zeros(1, 4, **kind)), kind
        assert fusion.decodes(torch.nn.Linear(4, 4), torch.zeros(1, 4))


@pytest.mark.parametrize("method", ("lora", "loramoe"))
def test_dropout_in_training_is_no_step_of_the_kernel(method, steps):
    model = adapted(method, lora_dropout=0.5).train()
    with torch.no_grad():
        first, second = (model(IDS[:, :1]).logits for _ in range(2))
        assert not torch.equal(first, second)
        model.eval()(IDS[:, :1])
    assert steps == [False] * 12 + [True] * 6


MODES = {
    "left-padded": {}, "beams": {"num_beams": 3}, "static": {"cache_implementation": "static"},
    "assisted": {"prompt_lookup_num_tokens": 3},
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_alora_generates_with_steps_what_it_would_without(mode, steps, monkeypatch):
    model = adapted("alora").double()  # which no kernel takes: the truth
    ids = (
        torch.tensor([[0, 0, 7, 3, 41], [8, 2, 36, 62, 8]]) if mode != "assisted" else torch.tensor([[5, 17, 5, 17, 5]])
    )
    generate = dict(input_ids=ids, attention_mask=(ids != 0).long(), max_new_tokens=9, do_sample=False, **MODES[mode])
    expected = model.generate(**generate)
    assert True not in steps
    model.float()
    del steps[:]
    assert torch.equal(model.generate(**generate), expected) and True in steps


def test_a_layer_of_peft_with_a_bias_of_its_own():
    model = get_peft_model(
        tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True, init_lora_weights=False)
    )
    with torch.no_grad():
        before = model.eval()(IDS[:, :1]).logits
        assert relative_error(patch(model)(IDS[:, :1]).logits, before) < 1e-5


def test_codes_name_every_dtype():
    assert sorted(DTYPE_CODES.values()) == [0, 1, 2, 3] and extension().decode_max_tokens == MAX_TOKENS
