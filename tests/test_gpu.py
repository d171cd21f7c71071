"""What needs a GPU; test_gpu_interpreted.py runs all of it without one.

The mark `kernel` says which kernel a test proves, or that it is about the whole op in Triton or by the library.
"""

from functools import partial

import pytest
import shared_input_cases as shared
import torch
from gpu_params import kernel_params

from gci_kernels import hardware, ops
from gci_kernels.accuracy import error_bound, relative_error
from gci_kernels.hardware import Shape, self_check
from gci_kernels.ops import launching
from gci_kernels.ops.bottleneck import api, aten
from gci_kernels.ops.bottleneck import triton as stages
from gci_kernels.ops.bottleneck.plan import Plan
from gci_kernels.ops.gate import reference
from gci_kernels.ops.gate import triton as gate
from gci_kernels.ops.row_linear import triton as row_linear
from gci_kernels.proof.verify import CASES, DTYPES, Case, check_case, make_inputs, obstacle, run_case, widened

pytestmark = pytest.mark.gpu

DEVICE = "cpu" if launching.INTERPRETED else "cuda"
HALF = torch.float16 if launching.INTERPRETED else torch.bfloat16  # the interpreter's bfloat16 products are wrong
SHAPES = [
    self_check.ODD, Shape(1, 64, 48, 3, 1, 1), Shape(7, 51, 130, 15, 5, 2), Shape(64, 128, 96, 16, 2, 1),
]  # fmt: skip
if not launching.INTERPRETED:
    # Every tile there is; sums that many programs share; two products from one reading; ranks above one tile.
    SHAPES += [
        self_check.LARGE, Shape(4096, 320, 4096, 40, 8, 8), Shape(600, 4096, 1024, 32, 8, 8),
        Shape(300, 264, 1032, 150, 50, 7),
    ]  # fmt: skip


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


only_gpu = pytest.mark.skipif(launching.INTERPRETED, reason="nothing to see without a GPU")
KERNEL_DTYPES = [dtype for dtype in self_check.DTYPES if obstacle("triton", DEVICE, dtype) is None]


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=name)
@pytest.mark.parametrize("kernel", kernel_params(hardware.names("triton")))
def test_against_float64_and_the_same_bits_twice(kernel, dtype):
    # Over a few tokens attention's dq and dk are nothing but rounding, and an error relative to that says nothing.
    shapes = [shape for shape in SHAPES if kernel != "attention" or shape.tokens >= 64]
    checks = list(self_check.check_kernel(kernel, torch.device(DEVICE), dtypes=(dtype,), shapes=shapes))
    assert len(checks) >= 2 * 3 * len(shapes)
    assert not [check for check in checks if not check.passed]


@only_gpu
@pytest.mark.parametrize("kernel", kernel_params(hardware.names("triton")))
def test_the_self_check_proves(kernel, monkeypatch, tmp_path):
    monkeypatch.setenv("GCI_CACHE", str(tmp_path))
    device = torch.device("cuda", torch.cuda.current_device())
    with torch.autocast("cuda", torch.bfloat16), torch.inference_mode():
        record = hardware.renew(kernel, device)
    assert record.passed, record.reason
    assert hardware.find(kernel, device).source == str(hardware.own_path()) and hardware.proves(kernel, torch.bfloat16)


# Past 2^31 elements, where an index in 32 bits would wrap


@only_gpu
@pytest.mark.parametrize("kernel", kernel_params(("project", "expand", "reduce")))
def test_rows_far_into_memory(kernel):
    tokens, depth, last = 70_000, 32_768, 130
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GiB of free memory")
    x = torch.zeros(tokens, depth, dtype=torch.bfloat16, device="cuda")
    x[-last:] = torch.randn(last, depth, device="cuda")
    u, m = torch.randn(tokens, 16, device="cuda").bfloat16(), torch.randn(depth, 16, device="cuda")
    if kernel == "project":
        actual, expected = stages.project(x, m)[-last:], x[-last:].double() @ m.bfloat16().double()
    elif kernel == "expand":
        w, n = torch.randn(depth, 48, device="cuda").bfloat16(), torch.randn(16, 48, device="cuda")
        actual = stages.expand(u, n, x, w, None)[-last:]
        expected = x[-last:].double() @ w.double() + u[-last:].double() @ n.bfloat16().double()
    else:
        actual, expected = stages.reduce(u, x), u[-last:].double().t() @ x[-last:].double()
    assert relative_error(actual, expected) <= 1e-2  # a wrong row is wrong by more than 1


@only_gpu
@pytest.mark.parametrize("sum_rows", (False, True))
@pytest.mark.kernel("row_linear")
def test_rows_of_w_far_into_memory(sum_rows, out=70_000, depth=32_768, half=65):
    """The last `half` of its own rows, and the active ones before them, far into the table that they come from."""
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of free memory")
    weight = torch.full((out, depth), float("nan"), dtype=torch.bfloat16, device="cuda")
    active, positions = torch.zeros_like(weight[half:]), torch.arange(out - half, device="cuda")
    for rows in (weight, active):
        rows[-half:] = torch.randn(half, depth, device="cuda") * depth**-0.5
    merged = torch.cat((active[-half:], weight[-half:])).double()
    if sum_rows:
        dy = torch.zeros(140, out, dtype=torch.bfloat16, device="cuda")
        dy[:, -2 * half :] = torch.randn(140, 2 * half, device="cuda")
        actual, expected = row_linear.dx(dy, weight, active, positions, None, ""), dy[:, -2 * half :].double() @ merged
    else:
        x = torch.randn(140, depth, device="cuda").bfloat16()
        actual = row_linear.forward(x, weight, None, active, positions, "")[:, -2 * half :]
        expected = x.double() @ merged.t()
    assert relative_error(actual, expected) <= 1e-2


# Dropout and the gate beyond what self_check.py looks at


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=name)
@pytest.mark.parametrize("seed", (0, 2**31, 2**61 + 12345))
@pytest.mark.kernel("dropout")
def test_mask_is_the_definition(seed, dtype):
    for rows, cols in ((1, 1), (130, 67), (3, 1030)):
        x = torch.rand(rows, cols, device=DEVICE).to(dtype) + 1
        assert torch.equal(stages.dropout(x, 0.3, seed), aten.dropout(x, 0.3, seed))


@pytest.mark.parametrize("top_k", (4, 2))
@pytest.mark.parametrize("where", (0, 3, 8, 11))
@pytest.mark.kernel("gate")
def test_nan_survives(where, top_k):
    """In h (columns 0 to 7) it reaches u; in a logit, chosen by top_k as the largest, every gate of its token."""
    projected = torch.ones(2, 12, device=DEVICE)
    projected[:, 8:10] = 2  # with top_k = 2, the first two experts
    projected[0, where] = float("nan")
    u, gates = gate.forward(projected, 4, top_k, 1.0, torch.float32)
    assert u[0].isnan().any() and not u[1].isnan().any()
    assert gates[0].isnan().any() == (where >= 8) and not gates[1].isnan().any()
    dprojected, _ = gate.backward(torch.ones_like(u), torch.ones_like(gates), projected, 4, top_k, 1.0, u.dtype)
    assert dprojected[0].isnan().any() and not dprojected[1].isnan().any()


@pytest.mark.kernel("gate")
def test_ties_go_to_the_lower_expert():
    logits = torch.randint(3, (40, 6), device=DEVICE).float()
    projected = torch.cat((torch.ones_like(logits), logits), dim=1)
    for top_k in range(1, 7):
        _, gates = gate.forward(projected, 6, top_k, 1.0, torch.float32)
        expected = reference.gates(logits, top_k)
        assert torch.equal(gates != 0, expected != 0) and relative_error(gates, expected) < 1e-6


# The whole op

BOTTLENECKS = [case for case in CASES if case.method != "loki" and not case.step]
OP_CASES = [*BOTTLENECKS[:3], BOTTLENECKS[5], BOTTLENECKS[-1]] if launching.INTERPRETED else BOTTLENECKS
MIXED_CASES = (OP_CASES[-1], OP_CASES[0], Case("loramoe", 64, 96, 80, 4, experts=6, top_k=2))


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("impl", [
    pytest.param("aten", marks=pytest.mark.kernel("library")),
    pytest.param("triton", marks=pytest.mark.kernel("whole op")),
])  # fmt: skip
@pytest.mark.parametrize("case", OP_CASES, ids=str)
def test_op_against_float64(case, impl, dtype):
    if impl == "triton" and dtype not in KERNEL_DTYPES:
        with pytest.raises(ValueError, match="impl='triton' cannot run here"):
            run_case(case, make_inputs(case, dtype, DEVICE), impl)
        return
    assert not [check for check in check_case(case, dtype, impl, DEVICE) if not check.passed]


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=name)
@pytest.mark.parametrize("case", OP_CASES, ids=str)
@pytest.mark.kernel("whole op")
def test_op_gives_the_same_bits_twice(case, dtype):
    tensors = make_inputs(case, dtype, DEVICE)
    first, second = (run_case(case, tensors, "triton") for _ in range(2))
    for key in first:
        assert torch.equal(first[key], second[key]), key


@pytest.mark.parametrize("others", ("aten", "triton"))
@pytest.mark.parametrize("kernel", kernel_params(set(hardware.names("triton")) - {"row_linear"}))
def test_one_stage_among_others(kernel, others, monkeypatch):
    """A plan as "auto" makes it while some kernels are proved and others are not."""
    stage, own = "mix" if kernel in ("gate", "attention") else kernel, "triton" if others == "aten" else "aten"
    plan = Plan(**{name: own if name == stage else others for name in Plan._fields})
    monkeypatch.setattr(api, "plan_for", lambda *_, **__: plan)
    for case in MIXED_CASES:
        tensors = make_inputs(case, HALF, DEVICE)
        truth = run_case(case, widened(tensors), "reference")
        plain, actual = (run_case(case, tensors, impl) for impl in ("reference", "auto"))
        for key in truth:
            bound = error_bound(relative_error(plain[key], truth[key]), HALF)
            assert relative_error(actual[key], truth[key]) <= bound, (case, key)


@pytest.mark.parametrize("method", ("lora", "loramoe", "alora"))
@pytest.mark.kernel("whole op")
def test_layers_that_are_given_the_same_x(method):
    x, layers = shared.layers_of(method, (1, 130), HALF, in_features=96, outs=(64, 17, 272))
    x, layers = x.to(DEVICE), [[None if t is None else t.to(DEVICE) for t in layer] for layer in layers]
    wide = [[None if t is None else t.double() for t in layer] for layer in layers]
    truth = shared.gradients(shared.run_apart, method, x.double(), wide, "reference")
    plain = shared.gradients(shared.run_apart, method, x, layers, "reference")
    actual = shared.gradients(shared.run, method, x, layers, "triton")
    for key, value in truth.items():
        if value is not None:
            assert relative_error(actual[key], value) <= error_bound(relative_error(plain[key], value), HALF), key


def leaves(case: Case) -> tuple[torch.Tensor, ...]:
    tensors = make_inputs(case, HALF, DEVICE)
    return tuple(tensors[key].requires_grad_() for key in ("x", "weight", "bias", "A", "B", "router"))


@pytest.mark.kernel("whole op")
def test_op_compiles_whole():
    arguments = leaves(Case("loramoe", 64, 96, 80, 4, experts=6))

    def function(*tensors):
        y, gates = ops.loramoe_linear(*tensors, scaling=2.0, impl="triton")
        return y.square().sum() + gates.square().sum()

    expected = torch.autograd.grad(function(*arguments), arguments)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for actual, wanted in zip(torch.autograd.grad(compiled(*arguments), arguments), expected, strict=True):
        assert torch.equal(actual, wanted)


@only_gpu
@pytest.mark.kernel("whole op")
def test_op_replays_in_a_cuda_graph():
    x, *rest = (tensor.detach() for tensor in leaves((600, 256, 320, 4, 8, None, 0.0)))

    def function():
        return ops.loramoe_linear(x, *rest, scaling=2.0, impl="triton")[0]

    function()  # compiled, and warm
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = function()
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, function())


@only_gpu
@pytest.mark.kernel("whole op")
def test_a_cuda_graph_draws_a_mask_for_each_replay():
    """In forward, and the same one again in backward."""
    x, weight, A, B = (torch.randn(s, device=DEVICE).to(HALF) for s in ((600, 256), (320, 256), (4, 256), (320, 4)))
    B.requires_grad_()
    function = partial(ops.lora_linear, x, weight, None, A, B, scaling=2.0, dropout_p=0.5, impl="triton")

    def step():
        y = function()
        return y.detach(), torch.autograd.grad(y.sum(), B)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compiled, and warm
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, dB = step()
    seen = []
    for _ in range(2):
        graph.replay()
        seen.append((y.clone(), dB.clone()))
    assert not torch.equal(seen[0][0], seen[1][0]) and not torch.equal(seen[0][1], seen[1][1])


def loki_leaves(tokens: int, depth: int, out: int, k: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Arguments of loki_linear: positions in no order, and the active rows and their bias in float32."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(DEVICE, dtype)

    return {
        "x": draw(tokens, depth).requires_grad_(), "weight": draw(out, depth, scale=depth**-0.5), "bias": draw(out),
        "active_weight": draw(k, depth, dtype=torch.float32, scale=depth**-0.5).requires_grad_(),
        "positions": torch.randperm(out, generator=g)[:k].to(DEVICE),
        "active_bias": draw(k, dtype=torch.float32).requires_grad_(),
    }  # fmt: skip


def loki_results(arguments: dict[str, torch.Tensor], impl: str) -> dict[str, torch.Tensor]:
    y = ops.loki_linear(**arguments, impl=impl)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
    leaves = {key: tensor for key, tensor in arguments.items() if tensor.requires_grad}
    return {"y": y} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=name)
@pytest.mark.parametrize("shape", [(130, 67, 45, 9), (1, 64, 48, 1), (64, 128, 96, 96)], ids=str)
@pytest.mark.kernel("row_linear")
def test_loki_linear_against_float64(shape, dtype):
    arguments = loki_leaves(*shape, dtype)
    wide = {
        key: tensor.detach().to(dtype).double().requires_grad_(tensor.requires_grad) if key != "positions" else tensor
        for key, tensor in arguments.items()
    }
    truth, plain, actual = (
        loki_results(wide, "reference"), loki_results(arguments, "reference"), loki_results(arguments, "triton")
    )  # fmt: skip
    for key in truth:
        assert relative_error(actual[key], truth[key]) <= error_bound(relative_error(plain[key], truth[key]), dtype), (
            key
        )


@only_gpu
@pytest.mark.kernel("row_linear")
def test_loki_linear_replays_in_a_cuda_graph():
    """The map of rows is made in the graph: positions that have changed count in the next replay."""
    arguments = {key: tensor.detach() for key, tensor in loki_leaves(600, 256, 320, 32, HALF).items()}
    ops.loki_linear(**arguments, impl="triton")  # compiled, and warm
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.loki_linear(**arguments, impl="triton")
    arguments["x"].copy_(torch.randn_like(arguments["x"]))
    arguments["positions"].copy_(arguments["positions"].roll(1))
    graph.replay()
    assert torch.equal(y, ops.loki_linear(**arguments, impl="triton"))
