"""The CUDA C++ kernels of a decoding step (csrc/cuda) against float64; test_cuda_on_cpu.py runs this without a GPU.

No name here holds that of a Triton kernel: bench/gpu_proof.py tells by names which kernel a test is about.
"""

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gci_kernels import native
from gci_kernels.ops.decode import cuda
from gci_kernels.ops.decode.cuda import Group
from gci_kernels.testing import error_bound, relative_error

ON_CPU = os.environ.get("GCI_CUDA_ON_CPU")  # the kernels as compiled by tests/cuda_on_cpu
DEVICE = "cpu" if ON_CPU else "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned", "kernels")]
only_gpu = pytest.mark.skipif(ON_CPU is not None, reason="nothing to see without a GPU")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(BF16, BF16), (BF16, F32), (F16, F16), (F16, F32), (F32, F32)]


def name(value: object) -> str:
    return "-".join(str(part).removeprefix("torch.") for part in value) if isinstance(value, tuple) else str(value)


@pytest.fixture(scope="session")
def kernels():
    """On a CPU, the module in place of the extension."""
    if ON_CPU is None:
        if not native.available() or not native.extension().has_cuda:
            pytest.skip(f"no CUDA kernels: {native.why_unavailable() or native.CUDA_BUILD}")
        yield None
        return
    spec = importlib.util.spec_from_file_location("cuda_on_cpu", ON_CPU)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "extension", lambda: module)
        patch.setattr(cuda, "stream_of", lambda t: 0)
        patch.setattr(cuda, "current", lambda t: contextlib.nullcontext())
        yield module


def randn(*shape: int, dtype: torch.dtype = F32, gap: int = 0, offset: int = 0) -> torch.Tensor:
    """Numbers whose rows lie `gap` elements of NaN apart, `offset` behind an aligned address."""
    storage = torch.full((offset + shape[0] * (shape[1] + gap),), float("nan"), dtype=dtype, device=DEVICE)
    result = storage[offset:].view(shape[0], shape[1] + gap)[:, : shape[1]]
    return result.copy_(torch.randn(shape, device=DEVICE))


def make_group(dtype: torch.dtype, sizes: tuple, first: int, count: int) -> Group:
    inside, out, rank, experts, top_k = sizes
    width = rank * max(experts, 1)
    return Group(
        randn(width, inside, dtype=dtype) * inside**-0.5, randn(out, width, dtype=dtype), 1.5, first, count,
        randn(experts, inside, dtype=dtype) * 2 * inside**-0.5 if experts else None, top_k,
    )  # fmt: skip


def plain(x: torch.Tensor, y: torch.Tensor, groups: list[Group], rows: list[int], dtype: torch.dtype) -> torch.Tensor:
    """The definition at `dtype`."""
    y = y.to(dtype, copy=True)
    for g in groups:
        for row in rows[g.first : g.first + g.count]:
            h = g.A.to(dtype) @ x[row].to(dtype)
            if g.experts:
                logits = g.router.to(dtype) @ x[row].to(dtype)
                if g.top_k:
                    left_out = logits.argsort(descending=True, stable=True)[g.top_k :]
                    logits[left_out] = float("-inf")
                h = h * logits.softmax(0).repeat_interleave(h.shape[0] // g.experts)
            y[row] += g.scaling * (g.B.to(dtype) @ h)
    return y


def step(x: torch.Tensor, y: torch.Tensor, groups: list[Group], rows: list[int]) -> torch.Tensor:
    y = torch.empty_strided(y.shape, y.stride(), dtype=y.dtype, device=DEVICE).copy_(y)
    cuda.expand(cuda.project(x, groups, rows), y, groups, rows)
    return y


def check(x, y, groups, rows) -> None:
    """The addition is measured, not y: what a rounding of y hides is checked at the end."""
    actual, before = step(x, y, groups, rows), y.double()
    truth, working = plain(x, y, groups, rows, torch.float64), plain(x, y, groups, rows, F32)
    rounded = working.to(y.dtype).double() - before
    bound = error_bound(relative_error(rounded, truth - before), y.dtype)
    assert relative_error(actual.double() - before, truth - before) <= bound
    touched = {row for g in groups for row in rows[g.first : g.first + g.count]}
    untouched = [row for row in range(y.shape[0]) if row not in touched]
    assert torch.equal(actual[untouched], y[untouched])
    # Each value is rounded once, from a sum that is right to float32.
    spacing = torch.finfo(y.dtype).eps * truth.abs() + 1e-5 * (truth - before).abs().max()
    assert ((actual.double() - truth).abs() <= spacing).all()
    for _ in range(2):
        assert torch.equal(step(x, y, groups, rows), actual), "the same bits twice"


# in, out, rank, experts, top_k: aligned, odd in every direction, more than a lane loads early, one of each, the largest
SIZES = [
    (512, 256, 16, 0, None), (1000, 72, 4, 8, None), (515, 131, 3, 5, 2), (264, 65, 24, 4, 3), (8, 1, 1, 1, None),
    (1, 7, 2, 0, None), (80, 70, 512, 0, None), (90, 66, 1, 256, 17), (776, 130, 14, 33, 32),
]  # fmt: skip


@pytest.mark.parametrize("dtypes", DTYPES, ids=name)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_step_of_one_group(sizes, dtypes):
    for tokens in (1, 3, 16) if sizes[2] < 100 else (2,):
        x, y = randn(tokens, sizes[0], dtype=dtypes[0]), randn(tokens, sizes[1], dtype=dtypes[0])
        check(x, y, [make_group(dtypes[1], sizes, 0, tokens)], list(range(tokens)))


@pytest.mark.parametrize("dtypes", DTYPES, ids=name)
@pytest.mark.parametrize("gap", (0, 3, 8))
@pytest.mark.parametrize("offset", (0, 1))
def test_step_of_several_adapters_in_rows_of_any_order(dtypes, gap, offset):
    inside, out = 520, 136
    x, y = (randn(20, size, dtype=dtypes[0], gap=gap, offset=offset) for size in (inside, out))
    kinds = [((8, 4, None), 0, 3), ((6, 0, None), 3, 1), ((4, 8, 2), 6, 5), ((1, 0, None), 11, 2)]
    groups = [make_group(dtypes[1], (inside, out, *kind), first, count) for kind, first, count in kinds]
    check(x, y, groups, [19, 3, 0, 7, 5, 6, 8, 1, 2, 9, 10, 18, 4])  # those of tokens 4 and 5 have no adapter


@pytest.mark.parametrize("top_k", (None, 2))
@pytest.mark.parametrize("where", ("logit 0", "logit 3", "value 1"))
def test_nan_stays_where_it_is(where, top_k):
    group = make_group(F32, (64, 40, 2, 4, top_k), 0, 2)
    what, index = where.split()
    {"logit": group.router, "value": group.A}[what][int(index), 5] = float("nan")
    x, y = randn(2, 64), randn(2, 40)
    assert step(x, y, [group], [0, 1]).isnan().all()
    x[0, 5] = 1
    group.A.nan_to_num_(0), group.router.nan_to_num_(0)
    x[1, 5] = float("nan")
    actual = step(x, y, [group], [0, 1])
    assert actual[1].isnan().all() and not actual[0].isnan().any()


def test_ties_go_to_the_lower_expert():
    experts, x = 40, torch.ones(1, 16, device=DEVICE)
    for top_k in (1, 2, 7, 39, 40):
        group = make_group(F32, (16, experts, 1, experts, top_k), 0, 1)
        group.router.copy_(torch.randint(-1, 2, (experts, 1), device=DEVICE).expand(experts, 16))
        group.A.fill_(1 / 16), group.B.copy_(torch.eye(experts))
        y = torch.zeros(1, experts, device=DEVICE)
        wanted = plain(x, y, [group], [0], torch.float64)
        actual = step(x, y, [group], [0])
        assert torch.equal(actual != 0, wanted != 0) and relative_error(actual, wanted) < 1e-6


# Attention


def plain_attend(s: SimpleNamespace, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """u and the new rows [k | v], by the definition at `dtype`; attended is what the cache keeps of them."""
    past, rank = int(s.past), s.A.shape[0]
    z = s.x.to(dtype) @ s.A.to(dtype).t()
    q, new = (z @ s.qkv.to(dtype).t()).split((rank, 2 * rank), 1)
    kv = torch.cat((s.kv[:, :past], new.to(s.kv.dtype).unsqueeze(1)), 1).to(dtype)
    u = torch.zeros_like(z)
    for b in range(len(z)):
        seen = torch.ones(past + 1, dtype=torch.bool, device=DEVICE)
        if s.segments is not None:
            own = s.segments[b, past]
            seen = (s.segments[b, : past + 1] == own) & (own >= 0)
        if seen.any():
            k, v = (half.unflatten(1, (s.heads, -1)) for half in kv[b, seen].split(rank, 1))
            scores = torch.einsum("hd,khd->hk", q[b].unflatten(0, (s.heads, -1)), k) * (rank // s.heads) ** -0.5
            u[b] = torch.einsum("hk,khd->hd", scores.softmax(1), v).flatten()
    return u + z if s.residual else u, new


def make_attend(dtypes, batch, inside, rank, heads, past, capacity, segments=False, residual=False, gap=0, offset=0):
    dtype, adapter = dtypes
    kv = randn(batch * capacity, 2 * rank, dtype=dtype, offset=offset).view(batch, capacity, 2 * rank)
    kv[:, past:] = float("nan")
    ids = None
    if segments:
        ids = torch.randint(-1, 2, (batch, capacity + 3), dtype=torch.int32, device=DEVICE)
        ids[:, past] = torch.arange(batch, device=DEVICE) % 3 - 1
        kv[:, :past][ids[:, :past] < 0] = float("nan")
        ids[:, past + 1 :] = 2**31 - 1
    return SimpleNamespace(
        x=randn(batch, inside, dtype=dtype, gap=gap, offset=offset),
        A=randn(rank, inside, dtype=adapter) * inside**-0.5,
        qkv=randn(3 * rank, rank, dtype=adapter) * 2 * rank**-0.5,
        heads=heads,
        kv=kv,
        residual=residual,
        segments=ids,
        past=torch.tensor(past, dtype=torch.int32, device=DEVICE),
    )


def attend(s: SimpleNamespace) -> torch.Tensor:
    return cuda.attend(s.x, s.A, s.qkv, s.heads, s.kv, s.past, s.segments, s.residual)[0]


# batch, in, rank, heads, past, capacity: aligned; no past; odd; one column a head; wide heads; more heads than lanes
ATTEND = [
    (2, 512, 16, 4, 700, 701), (1, 4096, 16, 1, 0, 1), (3, 67, 6, 2, 33, 40), (2, 40, 24, 24, 130, 131),
    (1, 64, 40, 1, 300, 310), (2, 24, 128, 1, 65, 70), (1, 32, 96, 48, 50, 64), (1, 8, 512, 4, 9, 10),
    (1, 1, 1, 1, 3, 9),
]  # fmt: skip


@pytest.mark.parametrize("dtypes", DTYPES, ids=name)
@pytest.mark.parametrize("sizes", ATTEND, ids=str)
@pytest.mark.parametrize("segments", (False, True), ids=("whole", "segments"))
def test_attend(sizes, dtypes, segments):
    offset = 1 if sizes[2] == 6 else 0
    s = make_attend(dtypes, *sizes, segments=segments, residual=segments, gap=8 * (sizes[2] == 16), offset=offset)
    (truth, new), (working, working_new), before = plain_attend(s, torch.float64), plain_attend(s, F32), s.kv.clone()
    actual, past = attend(s), int(s.past)
    # The two may round one value of the new row differently, so that u too is right to the cache's rounding only.
    assert relative_error(actual, truth) <= error_bound(relative_error(working, truth), dtypes[0])
    bound = error_bound(relative_error(working_new.to(dtypes[0]), new), dtypes[0])
    assert relative_error(s.kv[:, past], new) <= bound
    s.kv[:, past] = before[:, past]
    assert torch.equal(s.kv.nan_to_num(7), before.nan_to_num(7)), "nothing but the new rows is written"
    assert torch.equal(attend(s), actual), "the same bits twice"


@pytest.mark.parametrize("past", (5, 6, -1, 2**31 - 1))
def test_a_full_cache_shows_and_is_not_written_beyond(past):
    s = make_attend((BF16, BF16), 2, 64, 16, 4, 4, 5)
    s.past.fill_(past)
    before = s.kv.clone()
    assert attend(s).isnan().all()
    assert torch.equal(s.kv.nan_to_num(7), before.nan_to_num(7))


def test_attend_then_the_second_half():
    s = make_attend((BF16, F32), 3, 128, 16, 4, 20, 30, residual=True)
    group, y = make_group(F32, (128, 48, 16, 0, None), 0, 3), randn(3, 48, dtype=BF16)
    group = Group(s.A, group.B, 0.5, 0, 3)
    truth = y.double() + 0.5 * plain_attend(s, torch.float64)[0] @ group.B.double().t()
    cuda.expand(attend(s).unsqueeze(0), y, [group], [0, 1, 2])
    assert relative_error(y, truth) <= 2 * torch.finfo(BF16).eps


# What only a GPU shows


@only_gpu
def test_attend_in_a_graph_over_a_growing_sequence():
    """1,000 replays, each a token further: the position is read on the GPU, and nothing else changes."""
    s = make_attend((BF16, BF16), 2, 256, 16, 4, 0, 1200)
    inputs, one = torch.randn(1000, 2, 256, device=DEVICE).to(BF16), torch.ones((), dtype=torch.int32, device=DEVICE)
    group, y = make_group(BF16, (256, 64, 16, 0, None), 0, 2), torch.zeros(2, 64, dtype=BF16, device=DEVICE)
    group, at = Group(s.A, group.B, 1.0, 0, 2), torch.zeros(1, dtype=torch.int64, device=DEVICE)

    def whole():
        s.x.copy_(inputs.index_select(0, at)[0])
        y.zero_()
        u = cuda.attend(s.x, s.A, s.qkv, s.heads, s.kv, s.past)
        cuda.expand(u, y, [group], [0, 1])
        s.past.add_(one)
        at.add_(1)
        return u

    torch.use_deterministic_algorithms(False)  # poisoning adds launches
    whole()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        u = whole()
    s.past.zero_(), at.zero_()
    for token in range(1000):
        graph.replay()
        if token in (0, 1, 31, 500, 999):
            s.past.fill_(token)
            truth, new = plain_attend(s, torch.float64)
            assert relative_error(u[0], truth) <= 3e-2 and torch.equal(s.x, inputs[token])
            assert relative_error(y, truth @ group.B.double().t()) <= 4e-2
            assert relative_error(s.kv[:, token], new) <= 1e-2
            s.past.fill_(token + 1)


@only_gpu
@pytest.mark.parametrize("dtypes", DTYPES, ids=name)
def test_step_in_a_graph(dtypes):
    x, y = randn(4, 1024, dtype=dtypes[0]), torch.zeros(4, 512, dtype=dtypes[0], device=DEVICE)
    kinds = [((4, 8, None), 0, 3), ((16, 0, None), 3, 1)]
    groups = [make_group(dtypes[1], (1024, 512, *kind), first, count) for kind, first, count in kinds]

    def whole():
        y.zero_()
        cuda.expand(cuda.project(x, groups, [0, 1, 2, 3]), y, groups, [0, 1, 2, 3])

    whole()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        whole()
    for _ in range(50):
        x.copy_(torch.randn_like(x))
        graph.replay()
        by_graph = y.clone()
        whole()
        assert torch.equal(by_graph, y)


@only_gpu
@pytest.mark.parametrize("tool", ("memcheck", "racecheck", "synccheck"))
@pytest.mark.parametrize("some", ("one_group and 131", "several", "test_attend and not then"))
def test_sanitizer(tool, some):
    beside = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "compute-sanitizer")
    program = shutil.which("compute-sanitizer") or (str(beside) if beside.exists() else None)
    if program is None:
        pytest.skip("there is no compute-sanitizer")
    chosen = ["-m", "gpu", "-k", f"{some} and bfloat16-float32 and not sanitizer", __file__]
    command = [program, "--tool", tool, "--error-exitcode", "77", "--kernel-name", "kns=decode_"]
    command += [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *chosen]
    # Tensors are not cut from one large block then, whose neighbours the tool could not tell from them.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and " passed" in done.stdout, (done.stdout + done.stderr)[-3000:]
