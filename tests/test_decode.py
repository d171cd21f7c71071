"""Decoding steps: the C++ kernel against float64, and the registered operators."""

import os
import subprocess
import sys

import pytest
import torch
from decode_cases import double, drawer, expected, group_of, make, make_base, run

from gci_kernels import native, ops
from gci_kernels.accuracy import error_bound, relative_error
from gci_kernels.native import extension
from gci_kernels.ops.decode import Group, find_step

pytestmark = pytest.mark.usefixtures("poisoned")

PAIRS = [
    (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16), (torch.float16, torch.float32),
]  # fmt: skip
# tokens, in, out, rank, experts (0: LoRA), top_k
CASES = [
    (1, 67, 45, 16, 0, 0), (1, 576, 130, 4, 8, 8), (2, 33, 20, 3, 5, 2), (3, 64, 64, 40, 0, 0), (5, 1, 1, 1, 1, 1),
    (7, 130, 77, 8, 0, 0), (8, 96, 200, 4, 6, 6), (16, 257, 96, 16, 2, 1), (16, 31, 300, 1, 256, 3),
    (4, 40, 35, 500, 0, 0), (13, 70, 33, 2, 3, 3),
]  # fmt: skip
BASES = ("y", "weight", "weight and bias")


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("dtype", "adapter_dtype"), PAIRS, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case, dtype, adapter_dtype, base):
    *shape, top_k = case
    x, A, router, B, y = make(*shape, dtype, adapter_dtype)
    weight, bias = make_base(base, *shape[1:3], dtype)
    truth = expected(*double(x, A, router, B, y), top_k, 2.0, *double(weight, bias))
    rounded = [t if t is None else t.to(dtype) for t in (A, router, B)]
    plain = expected(x, *rounded, y, top_k, 2.0, weight, bias)
    plain_truth = expected(*double(x, *rounded, y), top_k, 2.0, *double(weight, bias))
    given = y if weight is None else None
    results = [run(x, A, router, B, given, weight, bias, top_k=top_k) for _ in range(2)]
    assert torch.equal(*results)
    bound = error_bound(relative_error(plain, plain_truth), dtype)
    assert relative_error(results[0], truth) <= bound
    assert results[0].dtype == dtype and results[0].shape == y.shape


def test_every_instruction_set(tmp_path):
    """Each in a process of its own: the extension chooses once."""
    for isa in native.ISAS[: native.ISAS.index(native.ISA)]:
        environment = os.environ | {"GCI_CPU_ISA": isa}
        tests = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "float64 or half or attention"]
        done = subprocess.run([sys.executable, *tests], env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{isa}: {done.stdout}"


@pytest.fixture(params=(1, 2, 5))
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.smoke
@pytest.mark.parametrize("base", BASES)
def test_groups_of_tokens_with_adapters_of_their_own(threads, base):
    """Tokens in no order, adapters of every kind and size, and two tokens without."""
    in_features, out_features, rows = 70, 153, (4, 0, 6, 2, 5, 1, 3)
    kinds = [(4, 0, 0, rows[:1]), (3, 4, 2, rows[1:3]), (16, 0, 0, rows[3:5])]
    x, y = torch.randn(7, in_features), torch.randn(7, out_features)
    weight, bias = make_base(base, in_features, out_features, torch.float32)
    wanted = y.clone() if weight is None else torch.nn.functional.linear(x, weight, bias)
    groups, first = [], 0
    for seed, (rank, experts, top_k, mine) in enumerate(kinds):
        _, A, router, B, _ = make(1, in_features, out_features, rank, experts, torch.float32, torch.float32, seed)
        groups.append(group_of(A, router, B, 0.5 + seed, top_k or None, first, len(mine)))
        first += len(mine)
        wanted[list(mine)] = expected(x[list(mine)], A, router, B, wanted[list(mine)], top_k, 0.5 + seed)
    for _ in range(20):  # the threads share the work differently in every run
        actual = find_step(x, weight, bias, groups, rows).run(x, y.clone() if weight is None else None)
        assert relative_error(actual, wanted) < 1e-6
        assert weight is not None or torch.equal(actual[[1, 3]], y[[1, 3]])


def test_what_no_step_holds():
    lib, group = extension(), (0, 0, 0, 1, 0, 0, 1.0, 0, 1)
    with pytest.raises(ValueError, match="at most 16 tokens"):
        lib.DecodeStep(0, 0, 4, 4, list(range(17)), [])
    with pytest.raises(ValueError, match="for every group or for none"):
        lib.DecodeStep(0, 0, 4, 4, [0, 1], [group, group], [(0, 1, False)])


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_values_are_rounded_as_torch_rounds_them(dtype):
    """Every value goes through the kernel unchanged, and sums are rounded to the nearest, ties to even."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()].contiguous()
    one = torch.ones(1, 1, dtype=dtype)
    same = run(one, torch.zeros(1, 1), None, torch.zeros(every.numel(), 1), every[None], scaling=1.0)
    assert torch.equal(same[0], every + 0.0)
    ties = 1 + torch.arange(64) * (torch.finfo(dtype).eps / 2)
    wide = torch.cat(
        (torch.linspace(-70000, 70000, 4001), torch.logspace(-9, 5, 4001), ties, torch.tensor([65519.9, 65520]))
    )
    zeros, B = torch.zeros(1, wide.numel(), dtype=dtype), wide[:, None].contiguous()
    assert torch.equal(run(one, torch.ones(1, 1), None, B, zeros, scaling=1.0)[0], wide.to(dtype))


# Attention


def make_attention(batch, past, in_features, rank, dtype, adapter_dtype, segmented, wider=0):
    x, A, _, B, y = make(batch, in_features, 45, rank, 0, dtype, adapter_dtype)
    qkv = drawer(3)(3 * rank, rank, scale=rank**-0.5, dtype=adapter_dtype)
    kv = torch.full((batch, past + 5, 2 * rank + wider), float("nan"), dtype=dtype)
    kv[:, :past, : 2 * rank] = torch.randn(batch, past, 2 * rank)
    segments = None
    if segmented:
        segments = torch.ones(batch, past + 1, dtype=torch.int32)
        for row in range(batch):
            segments[row, : past * row // batch] = -1 if row % 2 else 0
        if batch > 2:
            segments[2] = -1  # its new token is padding
    return x, A, B, y, qkv, kv, segments


def attended(x, A, B, y, qkv, kv, segments, past, heads, residual, dtype, scaling=2.0):
    """What alora_linear makes of the same past, at `dtype`: y, and k and v of the new tokens."""
    A, qkv, B = (t.to(dtype) for t in (A, qkv, B))
    update, new = ops.alora_linear(
        x.to(dtype)[:, None], None, None, A, qkv, B, num_heads=heads, scaling=scaling, residual=residual,
        past=kv[:, :past, : 2 * A.shape[0]].to(dtype), sequence=ops.Sequence(segments, past), impl="reference",
    )  # fmt: skip
    return y.to(dtype) + update[:, 0], new[:, 0]


ATTENTION = [
    (1, 0, 20, 4, 1, False), (3, 7, 67, 16, 4, True), (2, 130, 33, 12, 4, False), (16, 40, 64, 32, 2, True),
    (1, 300, 576, 64, 2, False), (5, 1, 9, 1, 1, True),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "adapter_dtype"), PAIRS, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("segmented", (False, True))
@pytest.mark.parametrize(("batch", "past", "in_features", "rank", "heads", "residual"), ATTENTION)
def test_attention_of_a_new_token(batch, past, in_features, rank, heads, residual, segmented, dtype, adapter_dtype):
    """Against alora_linear with the same past; the cache holds NaN where nothing is seen, and behind its end."""
    x, A, B, y, qkv, kv, segments = make_attention(
        batch, past, in_features, rank, dtype, adapter_dtype, segmented, wider=6 if segmented else 0
    )
    clean = kv.clone()
    if segmented:
        kv[:, :past][segments[:, :past] != segments[:, -1:]] = float("nan")
    weight, bias = make_base("weight and bias" if residual else "y", in_features, 45, dtype)
    base = y if weight is None else torch.nn.functional.linear(x.double(), weight.double(), bias.double())

    what = (segments, past, heads, residual)
    truth = attended(x, A, B, base, qkv, clean, *what, torch.float64)
    plain = attended(x, A, B, base.to(dtype), qkv, clean, *what, dtype)
    group = Group(A, B, 2.0, 0, batch, None, None, qkv, heads, residual)
    results = []
    for turn in range(2):
        cache, filled = kv.clone(), past if turn else torch.tensor([past], dtype=torch.int32)
        found = find_step(x, weight, bias, (group,))
        results.append(found.attend(x, y.clone() if weight is None else None, cache, filled, segments))
    assert torch.equal(*results) and cache[:, past + 1 :].isnan().all() and cache[..., 2 * rank :].isnan().all()
    new = cache[:, past, : 2 * rank]
    for value, plain_value, true_value in zip((results[0], new), plain, truth, strict=True):
        assert relative_error(value, true_value) <= error_bound(relative_error(plain_value, true_value), dtype)


def test_attention_of_adapters_of_their_own(threads):
    """Sequences in no order, adapters of several sizes in one cache, and one sequence without."""
    past, rows, dtype = 300, (3, 0, 4, 1, 2), torch.float32
    sizes = [(8, 2, True, rows[:2]), (4, 1, False, rows[2:4])]
    x, y, kv = torch.randn(5, 40), torch.randn(5, 45), torch.full((5, past + 2, 16), float("nan"))
    kv[:, :past] = torch.randn(5, past, 16)
    wanted, wanted_kv, groups, first = y.double(), kv.clone(), [], 0
    for seed, (rank, heads, residual, mine) in enumerate(sizes):
        mine = list(mine)
        _, A, _, B, _ = make(1, 40, 45, rank, 0, dtype, dtype, seed)
        qkv = drawer(seed)(3 * rank, rank, scale=rank**-0.5, dtype=dtype)
        groups.append(Group(A, B, 1.0 + seed, first, 2, None, None, qkv, heads, residual))
        wanted[mine], new = attended(
            x[mine], A, B, y[mine], qkv, kv[mine], None, past, heads, residual, torch.float64, 1.0 + seed
        )
        wanted_kv[mine, past, : 2 * rank] = new.float()
        first += 2
    for _ in range(30):  # the threads share the work differently in every run
        cache = kv.clone()
        actual = find_step(x, None, None, groups, rows).attend(x, y.clone(), cache, past, None)
        assert relative_error(actual, wanted) < 1e-6 and torch.equal(actual[2], y[2])
        assert torch.equal(cache.isnan(), wanted_kv.isnan())
        assert relative_error(cache.nan_to_num(), wanted_kv.nan_to_num()) < 1e-6


@pytest.mark.parametrize("past", (7, 12, -1))
def test_attention_where_the_cache_is_full(past):
    x, A, B, y, qkv, kv, _ = make_attention(2, 2, 20, 4, torch.float32, torch.float32, False)
    found, before = find_step(x, None, None, (Group(A, B, 2.0, 0, 2, None, None, qkv),)), kv.clone()
    with pytest.raises(IndexError, match=f"a capacity of 7 tokens, {past} of which"):
        found.attend(x, y, kv, torch.tensor(past), None)
    assert torch.equal(kv.nan_to_num(), before.nan_to_num())


def test_nan_of_a_logit_reaches_the_output():
    x, A, router, B, y = make(2, 20, 9, 2, 4, torch.float32, torch.float32)
    router[3] = float("nan")
    assert run(x, A, router, B, y, top_k=2).isnan().all()


# Operators


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("several", (False, True))
def test_operator(base, several):
    x, A, router, B, y = make(5, 20, 9, 2, 4, torch.float32, torch.float32)
    weight, bias = make_base(base, 20, 9, torch.float32)
    _, A2, _, B2, _ = make(5, 20, 9, 3, 0, torch.float32, torch.float32)
    first = (x, weight, bias, y if weight is None else None)
    if several:
        arguments = (*first, [A, A2], [B, B2], [router, None], [2.0, 1.0], [4, 0], [4, 0, 1, 3, 2], [2, 2])
    else:
        arguments = (*first, [A], [B], [router], [2.0], [4], [], [])
    before = y.clone()
    actual = torch.ops.gci_kernels.decode(*arguments)
    wanted = expected(x, A, router, B, y, 4, 2.0, weight, bias)
    if several:
        mine = [1, 3]
        plain = y if weight is None else torch.nn.functional.linear(x, weight, bias)
        wanted[mine] = expected(x[mine], A2, None, B2, plain[mine], 0, 1.0)
        wanted[2] = plain[2]
    assert relative_error(actual, wanted) < 1e-6 and torch.equal(y, before)
    torch.library.opcheck(torch.ops.gci_kernels.decode.default, arguments)


@pytest.mark.parametrize("segmented", (False, True))
def test_operator_with_attention(segmented):
    x, A, B, y, qkv, kv, segments = make_attention(3, 6, 20, 8, torch.float32, torch.float32, segmented)
    kv = kv.nan_to_num(0)  # opcheck compares
    past = torch.tensor([6], dtype=torch.int32)
    arguments = (x, None, None, y, [A], [B], [qkv], kv, past, segments, [2.0], [2], [True], [], [])
    wanted, new = attended(x, A, B, y, qkv, kv, segments, 6, 2, True, torch.float64)
    assert relative_error(torch.ops.gci_kernels.decode_attend(*arguments), wanted) < 1e-6
    assert relative_error(kv[:, 6], new) < 1e-6
    torch.library.opcheck(torch.ops.gci_kernels.decode_attend.default, arguments)
