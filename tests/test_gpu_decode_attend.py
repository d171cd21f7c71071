"""The CUDA C++ kernel of ALoRA's decoding step against float64; test_cuda_on_cpu.py runs this without a GPU."""

import dataclasses

import pytest
import torch
from gpu_decode_cases import BF16, DEVICE, DTYPES, F32, name, only_gpu, randn

from gci_kernels.accuracy import error_bound, relative_error
from gci_kernels.ops.decode import cuda
from gci_kernels.ops.decode.cuda import Step
from gci_kernels.ops.decode.group import Group

pytestmark = [pytest.mark.gpu, pytest.mark.kernel("decode_attend"), pytest.mark.usefixtures("poisoned", "kernels")]


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


@pytest.mark.parametrize("dtypes", DTYPES, ids=name)
@pytest.mark.parametrize("segments", (False, True), ids=("whole", "segments"))
@pytest.mark.parametrize("width", (48, 52, 55))
@pytest.mark.parametrize("kinds", MIXED, ids=("aligned", "odd"))
def test_attend_for_several_adapters_in_rows_of_any_order(dtypes, segments, width, kinds):
    groups = [make_attending(dtypes[1], 72, *kind) for kind in kinds]
    rows = [6, 1, 4, 8, 0, 7][: max(g.first + g.count for g in groups) + 1]
    check_attend(make_case(dtypes[0], groups, [*rows, 3], 37, 41, sequences=9, width=width, segments=segments))


@pytest.mark.parametrize("where", ("A", "kv", "x"))
def test_attend_where_only_one_adapter_or_row_is_aligned(where):
    """What one launch may read at once is decided over all groups and strides."""
    groups = [make_attending(F32, 64, 8, 2, 0, 1), make_attending(F32, 64, 8, 2, 1, 2)]
    if where == "A":
        groups[1] = groups[1]._replace(A=randn(8, 64, offset=1))
    c = make_case(F32, groups, [2, 0, 1], 9, 12, width=17 if where == "kv" else 16, gap=int(where == "x"))
    check_attend(c)


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
