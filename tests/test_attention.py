"""low_rank_attention: every implementation against float64, over every kind of sequence."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gci_kernels.accuracy import error_bound, relative_error
from gci_kernels.ops import Sequence, low_rank_attention
from gci_kernels.ops.attention import aten, native, reference

pytestmark = pytest.mark.usefixtures("poisoned")

FUSED = {"aten": aten, "native": native}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def segments_of(kind, batch, keys):
    """int32 [batch, keys] of the named kind, or None."""
    column = torch.arange(keys).expand(batch, keys)
    row = torch.arange(1, batch + 1).unsqueeze(1)
    third = keys // 3
    ids = {
        "whole": None,
        "left padding": torch.where(column < third * row // batch, -1, 0),
        "right padding": torch.where(column >= keys - third * row // batch, -1, 0),
        "holes": torch.where((column * 7 + row) % 3 == 0, -1, 0),
        "packed": (column + row) // 5,
        "long packed": (column + row) // max(third, 1),
        "packed and padded": torch.where(column % 11 < 2, -1, column // 11),
        "out of order": (column * 5 + row) % 3 * 1000,
        "padding": torch.full((batch, keys), -1),
    }[kind]
    return None if ids is None else ids.int()


KINDS = ("whole", "left padding", "right padding", "holes", "packed", "long packed", "packed and padded",
         "out of order", "padding")  # fmt: skip

# batch, time, keys, heads, d: below, at and above a vector, a block of queries and a block of keys
SHAPES = [
    (2, 130, 130, 4, 4), (1, 1, 1, 1, 1), (3, 1, 200, 2, 8), (2, 7, 64, 1, 3), (1, 33, 65, 5, 1), (2, 40, 170, 1, 64),
    (1, 97, 97, 16, 16), (1, 64, 64, 4, 33), (2, 128, 129, 3, 5), (0, 5, 9, 2, 2), (2, 0, 7, 2, 2), (2, 0, 0, 1, 2),
]  # fmt: skip


def draw(batch, time, keys, heads, d, dtype=torch.float64, scale=1.0):
    """q, k, v, do"""
    g = torch.Generator().manual_seed(0)
    return [
        (torch.randn(batch, rows, heads * d, generator=g, dtype=torch.float64) * scale).to(dtype)
        for rows in (time, keys, keys, time)
    ]


def formula_gradients(do, q, k, v, heads, segments):
    """dq, dk and dv by autograd through the reference."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    gradients = torch.autograd.grad(reference.forward(*leaves, heads, segments)[0], leaves, do)
    return [gradient.contiguous() for gradient in gradients]


def results(module, q, k, v, do, heads, segments):
    """o, lse and the three gradients, by name; -inf of padding becomes 0."""
    o, lse = module.forward(q, k, v, heads, segments)
    if module is reference:
        gradients = formula_gradients(do, q, k, v, heads, segments)
    else:
        gradients = module.backward(do, q, k, v, o, lse, heads, segments)
    nothing = torch.zeros_like(lse, dtype=torch.bool)
    if segments is not None:
        nothing = (segments[:, k.shape[1] - q.shape[1] :] < 0).unsqueeze(1).expand_as(lse)
    assert torch.equal(lse == float("-inf"), nothing)
    for name, t in zip(("o", "dq", "dk", "dv"), (o, *gradients), strict=True):
        assert t.dtype == q.dtype and t.is_contiguous(), name
    values = (o, lse.masked_fill(nothing, 0), *gradients)
    return dict(zip(("o", "lse", "dq", "dk", "dv"), values, strict=True))


def restated(q, k, v, heads, segments):
    """The rule, one query at a time."""
    batch, time, r = q.shape
    past, d = k.shape[1] - time, r // heads
    rows = []
    for b in range(batch):
        for i in range(time):
            own = 0 if segments is None else segments[b, past + i].item()
            seen = [j for j in range(past + i + 1) if segments is None or segments[b, j].item() == own]
            for h in range(heads):
                column = slice(h * d, h * d + d)
                if own < 0:
                    rows.append(torch.zeros(d, dtype=q.dtype))
                    continue
                scores = torch.stack([q[b, i, column] @ k[b, j, column] / d**0.5 for j in seen])
                weights = scores.exp() / scores.exp().sum()
                rows.append(sum(w * v[b, j, column] for w, j in zip(weights, seen, strict=True)))
    return torch.stack(rows).view(batch, time, r)


@pytest.mark.smoke
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", ("reference", *FUSED))
def test_equals_restatement(kind, impl):
    q, k, v, do = (t.requires_grad_() for t in draw(2, 9, 13, 2, 3))
    segments = segments_of(kind, 2, 13)
    expected = restated(q, k, v, 2, segments)
    actual = low_rank_attention(q, k, v, num_heads=2, sequence=Sequence(segments, past=4), impl=impl)
    assert (actual - expected).norm() <= 1e-13 * (1 + expected.norm())
    if kind == "padding":
        assert (actual == 0).all()
        for gradient in torch.autograd.grad(actual, (q, k, v), do):
            assert (gradient == 0).all()
        return
    gradients = [torch.autograd.grad(y, (q, k, v), do) for y in (actual, expected)]
    for a, b in zip(*gradients, strict=True):
        assert relative_error(a, b) < 1e-13


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("kind", ("whole", "packed"))
def test_every_place_of_the_diagonal_in_a_tile(impl, kind):
    for past in range(130):
        arguments, segments = draw(1, 3, past + 3, 1, 2), segments_of(kind, 1, past + 3)
        expected = results(reference, *arguments, 1, segments)
        for name, actual in results(FUSED[impl], *arguments, 1, segments).items():
            assert (actual - expected[name]).norm() <= 1e-12 * (1 + expected[name].norm()), (past, name)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_equals_reference(impl, kind, shape):
    batch, time, keys, heads, d = shape
    arguments, segments = draw(*shape), segments_of(kind, batch, keys)
    expected = results(reference, *arguments, heads, segments)
    actual = results(FUSED[impl], *arguments, heads, segments)
    for name, value in expected.items():
        # Where one key is attended dq and dk are 0: the scale is 1 where the truth is smaller.
        assert (actual[name] - value).norm() <= 1e-12 * (1 + value.norm()), name


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("kind", ("whole", "left padding", "packed", "packed and padded"))
# Of one query alone there are too few numbers to compare two roundings by; a long sum shows how it is made.
@pytest.mark.parametrize("shape", [(2, 130, 130, 4, 4), (40, 1, 203, 2, 8), (1, 1400, 1500, 2, 4), (1, 90, 100, 2, 64)],
                         ids=str)  # fmt: skip
def test_error_at_most_twice_plain_pytorch(impl, dtype, kind, shape):
    batch, time, keys, heads, d = shape
    arguments, segments = draw(*shape, dtype=dtype), segments_of(kind, batch, keys)
    if impl == "native" and dtype == torch.float16:
        with pytest.raises(ValueError, match="impl='native' cannot run here: .* not float16"):
            low_rank_attention(*arguments[:3], num_heads=heads, sequence=Sequence(None, keys - time), impl=impl)
        return
    truth = results(reference, *(t.double() for t in arguments), heads, segments)
    plain = results(reference, *arguments, heads, segments)
    actual = results(FUSED[impl], *arguments, heads, segments)
    for name, value in truth.items():
        bound = error_bound(relative_error(plain[name], value), torch.float32 if name == "lse" else dtype)
        assert relative_error(actual[name], value) <= bound, name


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 3), time=st.integers(0, 150), past=st.integers(0, 150), heads=st.integers(1, 6),
    d=st.integers(1, 20), kind=st.sampled_from(KINDS), impl=st.sampled_from(tuple(FUSED)),
    dtype=st.sampled_from((torch.float64, torch.float32)),
)  # fmt: skip
def test_any_shape(batch, time, past, heads, d, kind, impl, dtype):
    q, k, v, do = draw(batch, time, time + past, heads, d, dtype)
    segments = segments_of(kind, batch, time + past)
    expected = results(reference, *(t.double() for t in (q, k, v, do)), heads, segments)
    actual = results(FUSED[impl], q, k, v, do, heads, segments)
    for name, value in expected.items():
        tolerance = 1e-12 if dtype == torch.float64 else 2e-6
        assert (actual[name] - value).norm() <= tolerance * (1 + value.norm()), name


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_strided_inputs(impl, dtype):
    batch, time, heads, r = 2, 70, 4, 16
    fused = torch.randn(batch, time, 3 * r, dtype=dtype)
    inputs = {
        "column slices": fused.split(r, dim=2),
        "every second column": torch.randn(batch, time, 6 * r, dtype=dtype)[..., ::2].split(r, dim=2),
        "time first": torch.randn(time, batch, 3 * r, dtype=dtype).transpose(0, 1).split(r, dim=2),
        "feature first": torch.randn(3 * r, batch, time, dtype=dtype).permute(1, 2, 0).split(r, dim=2),
        "one row for all": torch.randn(1, 1, 3 * r, dtype=dtype).expand(batch, time, -1).split(r, dim=2),
        "fewer queries": (fused[:, 30:, :r], *fused[..., r:].split(r, dim=2)),
    }
    segments = segments_of("packed and padded", 2 * batch, 2 * time)[::2, ::2]
    for name, (q, k, v) in inputs.items():
        do = torch.randn(r, batch, q.shape[1], dtype=dtype).permute(1, 2, 0)
        for gradient in (do, do.contiguous()[:, :, :1].expand_as(q)):
            strided = results(FUSED[impl], q, k, v, gradient, heads, segments)
            dense = [t.contiguous() for t in (q, k, v, gradient)]
            expected = results(FUSED[impl], *dense, heads, segments.contiguous())
            for key, value in expected.items():
                tolerance = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
                assert relative_error(strided[key], value) <= tolerance, (name, key)


@pytest.mark.parametrize("impl", FUSED)
def test_inputs_and_saved_tensors_are_not_overwritten(impl):
    before = draw(2, 70, 80, 4, 4, torch.float32)
    q, k, v, do = (t.clone().requires_grad_() for t in before)
    sequence = Sequence(segments_of("packed and padded", 2, 80), past=10)
    o = low_rank_attention(q, k, v, num_heads=4, sequence=sequence, impl=impl)
    first = torch.autograd.grad(o, (q, k, v), do, retain_graph=True)
    second = torch.autograd.grad(o, (q, k, v), do)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    for a, b in zip((q, k, v, do), before, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("heads", (1, 3, 4))
def test_same_bits_twice(impl, heads):
    arguments = draw(1, 600, 650, heads, 12 // heads, torch.float32)
    first = results(FUSED[impl], *arguments, heads, segments_of("long packed", 1, 650))
    for _ in range(5):
        again = results(FUSED[impl], *arguments, heads, segments_of("long packed", 1, 650))
        for name, value in first.items():
            assert torch.equal(again[name], value), name


@pytest.mark.parametrize("impl", ("reference", *FUSED))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("scale", (30.0, 1e3, 1e6))
def test_extreme_scores_stay_finite(impl, dtype, scale):
    """Scores up to 1e13: one key wins, or several that are equal; at the lower scales the softmax still has slopes."""
    q, k, v, do = draw(1, 90, 90, 2, 3, dtype)
    q, k = q * scale, k * scale
    k[:, 1::2] = k[:, ::2]
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    o = low_rank_attention(q, k, v, num_heads=2, impl=impl)
    gradients = torch.autograd.grad(o, (q, k, v), do)
    assert all(t.isfinite().all() for t in (o, *gradients))
    # Between float32 scores of 1e3 and more lie whole powers of e: there only the winner is sure.
    if dtype == torch.float64 or scale == 30.0:
        truth = reference.forward(*(t.detach().double() for t in (q, k, v)), 2, None)[0]
        assert relative_error(o, truth) < (1e-6 if dtype == torch.float64 else 1e-3)


@pytest.mark.parametrize("impl", ("reference", *FUSED))
@pytest.mark.parametrize("where", ("q", "k", "v", "do"))
@pytest.mark.parametrize("position", (0, 5, 40, 79))
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_nan_stays_visible(impl, where, position, value):
    """In what attends it and in the gradients of what it meets; but not in another row or head."""
    q, k, v, do = (t.float() for t in draw(2, 80, 80, 2, 4))
    {"q": q, "k": k, "v": v, "do": do}[where][0, position, 1] = value
    leaves = [t.requires_grad_() for t in (q, k, v)]
    o = low_rank_attention(*leaves, num_heads=2, impl=impl)
    dq, dk, dv = torch.autograd.grad(o, leaves, do)
    for t in (o, dq, dk, dv):
        assert t[1].isfinite().all() and t[0, :, 4:].isfinite().all()
    if where == "q":
        assert o[0, position, :4].isnan().all() and dk[0, : position + 1, 1].isnan().all()
    elif where == "do":
        assert not dv[0, : position + 1, 1].isfinite().any()
    else:
        # A key of inf scores -inf, which is nothing, with queries that are negative there.
        met = q[0, position:, 1] > 0 if where == "k" and value == float("inf") else slice(None)
        assert not o[0, position:, 1][met].isfinite().any()


@pytest.mark.parametrize("impl", ("reference", *FUSED))
def test_padding_may_hold_anything(impl):
    batch, keys, time = 2, 90, 70
    segments = segments_of("packed and padded", batch, keys)
    q, k, v, do = draw(batch, time, keys, 2, 4)
    dirty = [t.clone() for t in (q, k, v, do)]
    for t in dirty:
        t[segments[:, keys - t.shape[1] :] < 0] = float("nan")
    module = FUSED.get(impl, reference)
    clean, actual = results(module, q, k, v, do, 2, segments), results(module, *dirty, 2, segments)
    for name, value in clean.items():
        assert torch.equal(actual[name], value), name
    for name in ("o", "dq"):
        assert (actual[name][segments[:, keys - time :] < 0] == 0).all()
    for name in ("dk", "dv"):
        assert (actual[name][segments < 0] == 0).all()


def test_reference_gradcheck():
    for kind in ("whole", "left padding", "packed"):
        q, k, v, _ = (t.requires_grad_() for t in draw(2, 4, 6, 2, 2))
        sequence = Sequence(segments_of(kind, 2, 6), past=2)
        assert torch.autograd.gradcheck(
            lambda *a: low_rank_attention(*a, num_heads=2, sequence=sequence, impl="reference"),  # noqa: B023
            (q, k, v),
        )


@pytest.mark.parametrize("impl", FUSED)
def test_second_derivatives_are_those_of_the_formula(impl):
    leaves = [t.requires_grad_() for t in draw(1, 4, 6, 2, 2)[:3]]

    def second(impl: str) -> list[torch.Tensor]:
        o = low_rank_attention(*leaves, num_heads=2, impl=impl)
        first = torch.autograd.grad(o.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(d.square().sum() for d in first), leaves)

    for actual, expected in zip(second(impl), second("reference"), strict=True):
        assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("trained", ("q", "k", "v", "q v"))
def test_gradients_only_where_needed(impl, trained):
    q, k, v, do = draw(2, 9, 9, 2, 2)
    leaves = {n: t.clone().requires_grad_(n in trained.split()) for n, t in (("q", q), ("k", k), ("v", v))}
    low_rank_attention(**leaves, num_heads=2, impl=impl).backward(do)
    expected = results(reference, q, k, v, do, 2, None)
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == leaf.requires_grad
        if leaf.requires_grad:
            assert relative_error(leaf.grad, expected["d" + name]) < 1e-12


@pytest.mark.parametrize("impl", ("aten", "native"))
@pytest.mark.parametrize("kind", ("whole", "packed and padded"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
@pytest.mark.parametrize("shape", [(2, 5, 8, 2, 3), (1, 1, 6, 1, 4), (0, 3, 3, 1, 2)], ids=str)
def test_opcheck(impl, kind, dtype, shape):
    batch, time, keys, heads, d = shape
    q, k, v, do = draw(*shape, dtype)
    segments = segments_of(kind, batch, keys)
    # With gradients autograd's registration is checked too; it compares to float tolerances, so in float64 alone.
    leaves = [t.requires_grad_(dtype == torch.float64) for t in (q, k, v)]
    torch.library.opcheck(torch.ops.gci_kernels.low_rank_attention.default, (*leaves, heads, segments, impl))
    q, k, v = (t.detach() for t in (q, k, v))
    o, lse = torch.ops.gci_kernels.low_rank_attention(q, k, v, heads, segments, impl)
    backward = torch.ops.gci_kernels.low_rank_attention_backward.default
    torch.library.opcheck(backward, (do, q, k, v, o, lse, heads, segments, impl))


@pytest.mark.parametrize("impl", ("auto", "reference", "aten", "native"))
@pytest.mark.parametrize("dynamic", (False, True))
def test_compiles_whole(impl, dynamic):
    def layer(x, weight, segments):
        q, k, v = (x @ weight).split(8, dim=-1)
        return low_rank_attention(q, k, v, num_heads=2, sequence=Sequence(segments, 0), impl=impl).square()

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for time in (20, 33):
        x, weight = torch.randn(2, time, 8), torch.randn(8, 24)
        segments = segments_of("packed", 2, time)
        outputs = []
        for function in (layer, compiled):
            leaves = [t.clone().requires_grad_() for t in (x, weight)]
            y = function(*leaves, segments)
            outputs.append((y, *torch.autograd.grad(y.sum(), leaves)))
        for a, b in zip(*outputs, strict=True):
            assert relative_error(a, b) < 1e-6
    torch._dynamo.reset()


@pytest.mark.parametrize("impl", ("aten", "native"))
def test_cached_queries_equal_the_whole_pass(impl):
    """Decoding token by token, and in chunks, with a growing cache gives what one pass over all gives."""
    q, k, v, _ = draw(2, 70, 70, 2, 4)
    segments = segments_of("left padding", 2, 70)
    whole = low_rank_attention(q, k, v, num_heads=2, sequence=Sequence(segments), impl=impl)
    for edges in (range(71), (0, 33, 34, 70)):
        for start, end in zip(edges[:-1], edges[1:], strict=True):
            part = low_rank_attention(
                q[:, start:end], k[:, :end], v[:, :end], num_heads=2,
                sequence=Sequence(segments[:, :end], past=start), impl=impl,
            )  # fmt: skip
            assert (part - whole[:, start:end]).abs().max() < 1e-13


def test_memory_is_linear_in_time():
    """What a pass allocates beyond inputs and outputs at 4096 tokens; scores alone would be 268 MB."""
    from torch.profiler import ProfilerActivity, profile

    q, k, v, do = draw(1, 4096, 4096, 4, 4, torch.float32)
    for module, limit in ((native, 4e6), (aten, 16e6)):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            o, lse = module.forward(q, k, v, 4, None)
            module.backward(do, q, k, v, o, lse, 4, None)
        held = peak = 0
        for event in record.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        assert 0 < peak < limit


@pytest.mark.parametrize("impl", ("aten", "native"))
def test_same_bits_under_autocast(impl):
    q = torch.randn(2, 40, 8, requires_grad=True)

    def call():
        o = low_rank_attention(q, q, q, num_heads=2, impl=impl)
        return o, *torch.autograd.grad(o.sum(), q)

    expected = call()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = call()  # backward too
    assert all(map(torch.equal, actual, expected))
