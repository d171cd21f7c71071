"""The CUDA C++ kernels of a decoding step (csrc/cuda) against float64; test_cuda_on_cpu.py runs this without a GPU.

A test proves the kernel decode_step where no mark of its own says decode_attend.
"""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_params import kernel_params

from gci_kernels import hardware
from gci_kernels.accuracy import error_bound, relative_error
from gci_kernels.hardware import self_check
from gci_kernels.ops.decode import cuda
from gci_kernels.ops.decode.cuda import Step
from gci_kernels.ops.decode.group import Group

ON_CPU = os.environ.get("GCI_CUDA_ON_CPU")  # the kernels as compiled by tests/cuda_on_cpu
DEVICE = "cpu" if ON_CPU else "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.kernel("decode_step"), pytest.mark.usefixtures("poisoned", "kernels")]
attends = pytest.mark.kernel("decode_attend")
only_gpu = pytest.mark.skipif(ON_CPU is not None, reason="nothing to see without a GPU")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(BF16, BF16), (BF16, F32), (F16, F16), (F16, F32), (F32, F32)]


def name(value: object) -> str:
    return "-".join(str(part).removeprefix("torch.") for part in value) if isinstance(value, tuple) else str(value)


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
    Step(groups, rows, x.dtype).add(y, x)
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


@dataclasses.dataclass
class Case:
    """What one launch reads and writes."""

    x: torch.Tensor
    kv: torch.Tensor
    past: torch.Tensor
    groups: list[Group]
    rows: list[int]
    segments: torch.Tensor | None = None

    def step(self) -> Step:
        return Step(self.groups, self.rows, self.x.dtype)

    def attend(self, step: Step | None = None) -> torch.Tensor:
        return cuda.attend(step or self.step(), self.x, self.kv, self.past, self.segments)[0]


def plain_attend(c: Case, dtype: torch.dtype) -> tuple[list, list]:
    """For each group u and the new rows [k | v] of its tokens, by the definition at `dtype`."""
    past, us, news = int(c.past), [], []
    for g in c.groups:
        rank, rows = g.A.shape[0], c.rows[g.first : g.first + g.count]
        z = c.x[rows].to(dtype) @ g.A.to(dtype).t()
        q, new = (z @ g.qkv.to(dtype).t()).split((rank, 2 * rank), 1)
        kept = c.kv[rows, :past, : 2 * rank]
        kv = torch.cat((kept, new.to(kept.dtype).unsqueeze(1)), 1).to(dtype)  # what the cache keeps is what is attended
        u = torch.zeros_like(z)
        for i, row in enumerate(rows):
            seen = torch.ones(past + 1, dtype=torch.bool, device=DEVICE)
            if c.segments is not None:
                own = c.segments[row, past]
                seen = (c.segments[row, : past + 1] == own) & (own >= 0)
            if seen.any():
                k, v = (half.unflatten(1, (g.num_heads, -1)) for half in kv[i, seen].split(rank, 1))
                scores = torch.einsum("hd,khd->hk", q[i].unflatten(0, (g.num_heads, -1)), k)
                weights = (scores * (rank // g.num_heads) ** -0.5).softmax(1)
                u[i] = torch.einsum("hk,khd->hd", weights, v).flatten()
        us.append(u + z if g.residual else u)
        news.append(new)
    return us, news


def make_attending(
    dtype: torch.dtype, inside: int, rank: int, heads: int, first: int, count: int, residual: bool = False, out: int = 1
) -> Group:
    return Group(
        randn(rank, inside, dtype=dtype) * inside**-0.5, randn(out, rank, dtype=dtype), 0.5, first, count,
        qkv=randn(3 * rank, rank, dtype=dtype) * 2 * rank**-0.5, num_heads=heads, residual=residual,
    )  # fmt: skip


def make_case(
    dtype, groups, rows, past, capacity, *, sequences=None, width=None, segments=False, gap=0, offset=0
) -> Case:
    """The cache is NaN where nothing is to be read: beyond `past`, beside a group's columns, in padding."""
    sequences = sequences or max(rows) + 1
    width = width or 2 * max(g.A.shape[0] for g in groups)
    kv = randn(sequences * capacity, width, dtype=dtype, offset=offset).view(sequences, capacity, width)
    kv[:, past:] = float("nan")
    used = {row: 2 * g.A.shape[0] for g in groups for row in rows[g.first : g.first + g.count]}
    for row in range(sequences):
        kv[row, :, used.get(row, 0) :] = float("nan")
    ids = None
    if segments:
        ids = torch.randint(-1, 2, (sequences, capacity + 3), dtype=torch.int32, device=DEVICE)
        ids[:, past] = torch.arange(sequences, device=DEVICE) % 3 - 1
        kv[:, :past][ids[:, :past] < 0] = float("nan")
        ids[:, past + 1 :] = 2**31 - 1
    x = randn(sequences, groups[0].A.shape[1], dtype=dtype, gap=gap, offset=offset)
    return Case(x, kv, torch.tensor(past, dtype=torch.int32, device=DEVICE), groups, rows, ids)


def check_attend(c: Case) -> None:
    def joined(parts) -> torch.Tensor:
        return torch.cat([part.flatten() for part in parts])

    truth, working = ([joined(parts) for parts in plain_attend(c, dtype)] for dtype in (torch.float64, F32))
    step, dtype, past, before = c.step(), c.x.dtype, int(c.past), c.kv.clone()
    actual = c.attend(step)
    us, kept = [], []
    for g in c.groups:
        tokens, rank = slice(g.first, g.first + g.count), g.A.shape[0]
        us.append(actual[tokens, :rank])
        assert actual[tokens, rank:].isnan().all(), "nothing behind a group's columns is written"
        kept.append(c.kv[c.rows[tokens], past, : 2 * rank])
        c.kv[c.rows[tokens], past, : 2 * rank] = before[c.rows[tokens], past, : 2 * rank]
    # The two may round one value of the new row differently, so that u too is right to the cache's rounding only.
    assert relative_error(joined(us), truth[0]) <= error_bound(relative_error(working[0], truth[0]), dtype)
    assert relative_error(joined(kept), truth[1]) <= error_bound(relative_error(working[1].to(dtype), truth[1]), dtype)
    assert torch.equal(c.kv.nan_to_num(7), before.nan_to_num(7)), "nothing but the new rows is written"
    idle = sorted(set(range(len(c.rows))) - {t for g in c.groups for t in range(g.first, g.first + g.count)})
    assert actual[idle].isnan().all(), "tokens without an adapter get nothing"
    assert torch.equal(c.attend(step).nan_to_num(7), actual.nan_to_num(7)), "the same bits twice"


# batch, in, rank, heads, past, capacity: aligned; no past; odd; one column a head; wide heads; more heads than lanes
ATTEND = [
    (2, 512, 16, 4, 700, 701), (1, 4096, 16, 1, 0, 1), (3, 67, 6, 2, 33, 40), (2, 40, 24, 24, 130, 131),
    (1, 64, 40, 1, 300, 310), (2, 24, 128, 1, 65, 70), (1, 32, 96, 48, 50, 64), (1, 8, 512, 4, 9, 10),
    (1, 1, 1, 1, 3, 9),
]  # fmt: skip


@attends
@pytest.mark.parametrize("dtypes", DTYPES, ids=name)
@pytest.mark.parametrize("sizes", ATTEND, ids=str)
@pytest.mark.parametrize("segments", (False, True), ids=("whole", "segments"))
def test_attend(sizes, dtypes, segments):
    batch, inside, rank, heads, past, capacity = sizes
    group = make_attending(dtypes[1], inside, rank, heads, 0, batch, residual=segments)
    where = dict(gap=8 * (rank == 16), offset=int(rank == 6))
    check_attend(make_case(dtypes[0], [group], list(range(batch)), past, capacity, segments=segments, **where))


# rank, heads, first, count, residual
MIXED = [((16, 4, 0, 2, False), (8, 1, 3, 1, True), (4, 2, 4, 2, False)), ((24, 3, 0, 1, True), (5, 5, 2, 3, False))]


@attends
@pytest.mark.parametrize("dtypes", DTYPES, ids=name)
@pytest.mark.parametrize("segments", (False, True), ids=("whole", "segments"))
@pytest.mark.parametrize("width", (48, 52, 55))
@pytest.mark.parametrize("kinds", MIXED, ids=("aligned", "odd"))
def test_attend_for_several_adapters_in_rows_of_any_order(dtypes, segments, width, kinds):
    groups = [make_attending(dtypes[1], 72, *kind) for kind in kinds]
    rows = [6, 1, 4, 8, 0, 7][: max(g.first + g.count for g in groups) + 1]
    check_attend(make_case(dtypes[0], groups, [*rows, 3], 37, 41, sequences=9, width=width, segments=segments))


@attends
@pytest.mark.parametrize("where", ("A", "kv", "x"))
def test_attend_where_only_one_adapter_or_row_is_aligned(where):
    """What one launch may read at once is decided over all groups and strides."""
    groups = [make_attending(F32, 64, 8, 2, 0, 1), make_attending(F32, 64, 8, 2, 1, 2)]
    if where == "A":
        groups[1] = groups[1]._replace(A=randn(8, 64, offset=1))
    c = make_case(F32, groups, [2, 0, 1], 9, 12, width=17 if where == "kv" else 16, gap=int(where == "x"))
    check_attend(c)


@attends
def test_attend_in_a_part_of_a_longer_cache():
    groups = [make_attending(BF16, 64, 8, 2, 0, 1), make_attending(BF16, 64, 4, 2, 1, 1)]
    c = make_case(BF16, groups, [3, 1], 6, 9)
    longer = torch.full((5, 20, 40), float("nan"), dtype=BF16, device=DEVICE)
    longer[:4, 4:13, 8:24] = c.kv
    c.kv = longer[:4, 4:13, 8:24]
    check_attend(c)
    c.attend()
    inside = torch.zeros_like(longer, dtype=torch.bool)
    inside[:4, 4:13, 8:24] = True
    assert longer[~inside].isnan().all()


@attends
@pytest.mark.parametrize("past", (5, 6, -1, 2**31 - 1))
def test_attend_over_a_full_cache_shows_and_is_not_written_beyond(past):
    groups = [make_attending(BF16, 64, 16, 4, 0, 1), make_attending(BF16, 64, 8, 1, 1, 1)]
    c = make_case(BF16, groups, [1, 0], 4, 5)
    c.past.fill_(past)
    before, u = c.kv.clone(), torch.zeros(1, 2, 16, device=DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", lambda *_, **__: u)
        c.attend()
    assert u[0, 0].isnan().all() and u[0, 1, :8].isnan().all() and (u[0, 1, 8:] == 0).all()
    assert torch.equal(c.kv.nan_to_num(7), before.nan_to_num(7))


@attends
@pytest.mark.parametrize("dtypes", DTYPES, ids=name)
def test_attend_then_the_second_half(dtypes):
    kinds = ((16, 4, 0, 2, True), (6, 3, 3, 1, False))
    groups = [make_attending(dtypes[1], 128, *kind, out=48) for kind in kinds]
    c, y = make_case(dtypes[0], groups, [5, 0, 2, 3], 20, 30, segments=True), randn(6, 48, dtype=dtypes[0])
    truth = y.double()
    for g, u in zip(groups, plain_attend(c, torch.float64)[0], strict=True):
        truth[c.rows[g.first : g.first + g.count]] += g.scaling * u @ g.B.double().t()
    before, step = y.clone(), c.step()
    step.add_attended(y, c.x, c.kv, c.past, c.segments)
    assert relative_error(y, truth) <= max(2 * torch.finfo(dtypes[0]).eps, 1e-6)
    assert torch.equal(y[[1, 2, 4]], before[[1, 2, 4]])


@pytest.mark.parametrize("dtype", self_check.DTYPES, ids=name)
@pytest.mark.parametrize("kernel", kernel_params(hardware.names("cuda")))
def test_self_check(kernel, dtype):
    checks = list(self_check.check_kernel(kernel, torch.device(DEVICE), dtypes=(dtype,)))
    assert len(checks) >= 16 and not [check for check in checks if not check.passed]


FAULTS = {
    "decode_step": [
        ("project", lambda right: lambda step, x: right(step, x) * 1.01),
        ("project", lambda right: lambda step, x: right(step, x).half().float()),
        ("expand", lambda right: lambda step, y, partial: right(step, y, partial.roll(1, 1))),
        ("expand", lambda right: lambda step, y, partial: [right(step, y, partial) for _ in range(2)]),
    ],
    "decode_attend": [
        ("attend", lambda right: lambda step, x, kv, past, segments: right(step, x, kv, past, None)),
        ("attend", lambda right: lambda step, x, kv, past, segments: right(step, x, kv, past - 1, segments)),
        ("attend", lambda right: lambda step, x, kv, past, segments: right(step, x.roll(1, 0), kv, past, segments)),
        ("expand", lambda right: lambda step, y, partial: right(step, y.clone(), partial)),
    ],
}  # fmt: skip


@pytest.mark.parametrize("fault", range(4))
@pytest.mark.parametrize("kernel", kernel_params(FAULTS))
def test_self_check_stops_wrong_kernels(monkeypatch, kernel, fault):
    where, wrong = FAULTS[kernel][fault]
    monkeypatch.setattr(cuda, where, wrong(getattr(cuda, where)))
    device = torch.device(DEVICE)
    for dtype in (F32, BF16) if (kernel, fault) != ("decode_step", 1) else (F32,):
        checks = self_check.check_kernel(kernel, device, dtypes=(dtype,), shapes=(self_check.ODD,))
        assert not all(check.passed for check in checks)


# What only a GPU shows


@only_gpu
@pytest.mark.parametrize("kernel", kernel_params(hardware.names("cuda")))
def test_self_check_proves(kernel, monkeypatch, tmp_path):
    monkeypatch.setenv("GCI_CACHE", str(tmp_path))
    device = torch.device("cuda", torch.cuda.current_device())
    with torch.autocast("cuda", torch.bfloat16), torch.inference_mode():
        record = hardware.renew(kernel, device)
    assert record.passed, record.reason
    assert hardware.find(kernel, device).source == str(hardware.own_path()) and hardware.proves(kernel)


@attends
@only_gpu
def test_attend_in_a_graph_over_a_growing_sequence():
    """1,000 replays, each a token further: the position is read on the GPU, and nothing else changes."""
    groups = [make_attending(BF16, 256, 16, 4, 0, 1, out=64), make_attending(BF16, 256, 8, 2, 1, 1, out=64)]
    c = make_case(BF16, groups, [1, 0], 0, 1200)
    inputs, one = torch.randn(1000, 2, 256, device=DEVICE).to(BF16), torch.ones((), dtype=torch.int32, device=DEVICE)
    y, at, step = randn(2, 64, dtype=BF16), torch.zeros(1, dtype=torch.int64, device=DEVICE), c.step()

    def whole():
        c.x.copy_(inputs.index_select(0, at)[0])
        y.zero_()
        step.add_attended(y, c.x, c.kv, c.past)
        c.past.add_(one)
        at.add_(1)

    torch.use_deterministic_algorithms(False)  # poisoning adds launches
    whole()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        whole()
    c.past.zero_(), at.zero_()
    for token in range(1000):
        graph.replay()
        if token in (0, 1, 31, 500, 999):
            c.past.fill_(token)
            assert torch.equal(c.x, inputs[token])
            for g, u, new in zip(groups, *plain_attend(c, torch.float64), strict=True):
                row = c.rows[g.first]
                assert relative_error(y[row], 0.5 * u[0] @ g.B.double().t()) <= 4e-2
                assert relative_error(c.kv[row, token, : 2 * g.A.shape[0]], new[0]) <= 1e-2
            c.past.fill_(token + 1)


@only_gpu
@pytest.mark.parametrize("dtypes", DTYPES, ids=name)
def test_step_in_a_graph(dtypes):
    x, y = randn(4, 1024, dtype=dtypes[0]), torch.zeros(4, 512, dtype=dtypes[0], device=DEVICE)
    kinds = [((4, 8, None), 0, 3), ((16, 0, None), 3, 1)]
    groups = [make_group(dtypes[1], (1024, 512, *kind), first, count) for kind, first, count in kinds]
    step = Step(groups, [0, 1, 2, 3], dtypes[0])

    def whole():
        y.zero_()
        step.add(y, x)

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
@pytest.mark.parametrize("some", [
    "one_group and 131", "step and several", pytest.param("attend and several", marks=attends),
    pytest.param("test_attend and 67", marks=attends),
])  # fmt: skip
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
