"""The attention's Triton kernels under the interpreter, on CPU tensors; run by test_attention_triton.py.

float32 and float16: the interpreter's bfloat16 products are wrong, and bfloat16 takes the same lines.
"""

import pytest
import torch

from gci_kernels.accuracy import error_bound, relative_error
from gci_kernels.ops import launching
from gci_kernels.ops.attention import config
from gci_kernels.ops.attention import triton as attention

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),  # numpy's, of log2(0) and NaN
]

DTYPES = (torch.float32, torch.float16)
# batch, time, keys, r, num_heads
SHAPES = [
    (2, 1, 1, 16, 4), (1, 7, 7, 5, 5), (1, 64, 64, 16, 4), (1, 130, 130, 8, 2), (1, 70, 70, 256, 4),
    (1, 66, 130, 48, 3), (2, 7, 150, 6, 1), (1, 1, 130, 40, 2), (1, 70, 70, 9, 3),
]  # fmt: skip
EMPTY = [(0, 5, 9, 16, 4), (2, 0, 9, 16, 4), (2, 0, 0, 16, 4)]
FAR = 2**31 - 1  # the largest id there is


def packed(batch, keys):
    """Sequences of several lengths, the same tiles in several of them, the second row's ids falling."""
    ids, row = 5 * (4 * torch.arange(keys) // max(keys, 1)), torch.arange(batch)[:, None]
    return torch.where(row % 2 == 1, FAR - ids, ids)


def padded(batch, keys, left):
    at, row = torch.arange(keys), torch.arange(batch)[:, None]
    return torch.where((at if left else at.flip(0)) < (row + 1) * keys // 3, -1, 7)


def holes(batch, keys):
    return torch.where(torch.rand(batch, keys) < 0.3, -1, packed(batch, keys))


SEGMENTS = {
    "none": lambda batch, keys: None,
    "one": torch.zeros,
    "left": lambda batch, keys: padded(batch, keys, left=True),
    "right": lambda batch, keys: padded(batch, keys, left=False),
    "packed": packed,
    "holes": holes,
    "shuffled": lambda batch, keys: torch.randint(-1, 3, (batch, keys)),
    "padding": lambda batch, keys: torch.full((batch, keys), -3),
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def small_tiles(monkeypatch):
    """Many tiles before, within and behind what needs no mask, and many steps in search of a segment."""
    tile = config.Tile(16, 32, 4, 1)
    small = config.AttentionConfig(16, 16, tile, config.Tile(32, 16, 4, 1), tile)
    monkeypatch.setattr(config, "choose_attention_config", lambda *_: small)


def test_the_interpreter_runs():
    assert launching.INTERPRETED


def make(batch, time, keys, r, dtype, scale=1.0):
    """do, q, k, v; the last three slices of one tensor that is NaN beside them."""
    wide = torch.full((batch, keys, 3 * r + 4), float("nan"), dtype=dtype)
    wide[..., : 3 * r] = scale * torch.randn(batch, keys, 3 * r)
    q, k, v, _ = wide.split((r, r, r, 4), dim=2)
    do = torch.randn(batch, r, time).to(dtype).transpose(1, 2)
    return do, q[:, keys - time :], k, v


def make_segments(name, batch, keys):
    segments = SEGMENTS[name](batch, keys)
    return None if segments is None else segments.to(torch.int32)


def attended(time, keys, segments):
    """Which query attends which key, bool [batch or 1, 1, time, keys]."""
    position = torch.arange(keys - time, keys)
    kept = (torch.arange(keys) <= position[:, None])[None]
    if segments is not None:
        own = segments[:, keys - time :, None]
        kept = kept & (own == segments[:, None, :]) & (own >= 0)
    return kept[:, None]


def formula(do, q, k, v, num_heads, segments):
    """o, lse, dq, dk, dv, as the package's docstring has them, by autograd in the tensors' dtype."""
    kept = attended(q.shape[1], k.shape[1], segments)
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (q, k, v)]
    heads = [tensor.unflatten(2, (num_heads, -1)).transpose(1, 2) for tensor in leaves]
    scores = heads[0] @ heads[1].transpose(2, 3) / heads[0].shape[3] ** 0.5
    scores = scores.masked_fill(~kept, float("-inf"))
    some = kept.any(3, keepdim=True)
    o = scores.masked_fill(~some, 0).softmax(3).masked_fill(~some, 0) @ heads[2]
    o = o.transpose(1, 2).flatten(2)
    return o.detach(), scores.detach().logsumexp(3), *torch.autograd.grad(o, leaves, do)


def split(tensors, num_heads):
    """float64 [batch, num_heads, positions, d]"""
    return [tensor.double().unflatten(2, (num_heads, -1)).transpose(1, 2) for tensor in tensors]


def joined(tensor):
    return tensor.transpose(1, 2).flatten(2)


def absolute_terms(do, q, k, v, num_heads, segments):
    """What dq and dk are sums of, each term by its absolute value: rounding is in proportion to these.

    The terms of a query that attends one key cancel: its dq is 0, and no rounding is small beside that.
    """
    do, q, k, v = split((do, q, k, v), num_heads)
    kept, root = attended(q.shape[2], k.shape[2], segments), q.shape[3] ** 0.5
    p = (q @ k.transpose(2, 3) / root).masked_fill(~kept, float("-inf")).softmax(3).nan_to_num(0)
    do, q, k, v = do.abs(), q.abs(), k.abs(), v.abs()
    ds = p * (do @ v.transpose(2, 3) + (do * (p @ v)).sum(3, keepdim=True)) / root
    return {"dq": joined(ds @ k), "dk": joined(ds.transpose(2, 3) @ q)}


def uncertain(q, k, num_heads, segments, dtype):
    """How far the weights [batch, num_heads, time, keys] may be off where their scores are rounded to `dtype`.

    A sum of d products is off by d/2 eps of their absolute values, and so is the logarithm of the sum, whose scores
    were perhaps summed in another order. A weight is at most 1, and 0 where it is below the least number of `dtype`.
    """
    q, k = split((q, k), num_heads)
    kept, root, d = attended(q.shape[2], k.shape[2], segments), q.shape[3] ** 0.5, q.shape[3]
    scores = (q @ k.transpose(2, 3) / root).masked_fill(~kept, float("-inf"))
    off = d / 2 * torch.finfo(dtype).eps * (q.abs() @ k.abs().transpose(2, 3) / root).masked_fill(~kept, 0)
    off, exponents = off + off.amax(3, keepdim=True), scores - scores.logsumexp(3, keepdim=True)
    off = (exponents + off).clamp(max=0).exp() - (exponents - off).exp() + torch.finfo(dtype).tiny
    return torch.where(kept & (exponents > float("-inf")), off, 0)


def run(do, q, k, v, num_heads, segments):
    o, lse = attention.forward(q, k, v, num_heads, segments)
    return o, lse, *attention.backward(do, q, k, v, o, lse, num_heads, segments)


def check(tensors, num_heads, segments):
    """No worse than the formula in plain PyTorch, and exactly 0 where nothing attends or is attended."""
    actual = run(*tensors, num_heads, segments)
    truth = formula(*(tensor.double() for tensor in tensors), num_heads, segments)
    plain = formula(*tensors, num_heads, segments)
    plain_lse = formula(*(tensor.float() for tensor in tensors), num_heads, segments)[1]
    dtype = tensors[0].dtype
    rounded = absolute_terms(*tensors, num_heads, segments)
    for name, each, true, usual in zip(("o", "lse", "dq", "dk", "dv"), actual, truth, plain, strict=True):
        assert each.shape == true.shape and each.dtype == (torch.float32 if name == "lse" else dtype), name
        if name == "lse":
            assert torch.equal(each.isneginf(), true.isneginf())
            each, true, usual = (lse.nan_to_num(neginf=0) for lse in (each, true, plain_lse))
        if name in rounded and (each.double() - true).norm() <= torch.finfo(dtype).eps * rounded[name].norm():
            continue
        assert relative_error(each, true) <= error_bound(relative_error(usual, true), each.dtype), name
    kept = attended(tensors[1].shape[1], tensors[2].shape[1], segments)[:, 0].expand(tensors[1].shape[0], -1, -1)
    for each, some in zip(actual[:1] + actual[2:], (kept.any(2), kept.any(2), kept.any(1), kept.any(1)), strict=True):
        assert not each[~some].any()


@pytest.mark.parametrize(
    ("dtype", "segments"), [(torch.float32, "none"), (torch.float32, "holes"), (torch.float16, "packed")]
)
@pytest.mark.parametrize(("batch", "time", "keys", "r", "num_heads"), SHAPES + EMPTY)
def test_shapes(batch, time, keys, r, num_heads, segments, dtype):
    check(make(batch, time, keys, r, dtype), num_heads, make_segments(segments, batch, keys))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("segments", SEGMENTS)
def test_segments(segments, dtype):
    check(make(2, 40, 70, 8, dtype), 2, make_segments(segments, 2, 70))


@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize(("time", "keys"), [(144, 144), (70, 131)])
def test_many_tiles(small_tiles, time, keys, segments):
    check(make(1, time, keys, 4, torch.float32), 1, make_segments(segments, 1, keys))


def test_every_place_of_the_diagonal_in_a_tile(small_tiles):
    """The last tile that needs no mask ends anywhere before the first query."""
    for past in range(33):
        check(make(1, 3, past + 3, 4, torch.float32), 1, None)


@pytest.mark.parametrize("segments", ("none", "holes"))
def test_strides(segments):
    """No stride is 1, columns outside of rows, a gradient of one number, segments of one row for all."""
    ids = make_segments(segments, 1, 20)
    ids = None if ids is None else ids.repeat_interleave(2, 1)[:, ::2].expand(3, -1)
    do = torch.randn(()).expand(3, 17, 6)
    q = torch.randn(3, 17, 6, 2)[..., 1]
    k, v = torch.randn(6, 20, 3).permute(2, 1, 0), torch.randn(20, 3, 12).transpose(0, 1)[..., ::2]
    check((do, q, k, v), 2, ids)
    o, lse = attention.forward(q, k, v, 2, ids)
    expected = attention.backward(do, q, k, v, o, lse, 2, ids)
    wide_o, wide_lse = torch.stack((o, o), 3)[..., 1], torch.stack((lse, lse), 3)[..., 1]
    for actual, usual in zip(attention.backward(do, q, k, v, wide_o, wide_lse, 2, ids), expected, strict=True):
        assert torch.equal(actual, usual)


@pytest.mark.parametrize("segments", ("left", "right", "holes", "padding"))
def test_what_padding_holds_reaches_nothing(small_tiles, segments):
    ids = make_segments(segments, 2, 60)
    tensors = make(2, 50, 60, 4, torch.float32)
    expected = run(*tensors, 1, ids)
    for value in (float("nan"), float("inf")):
        spoilt = [each.masked_fill((ids[:, 60 - each.shape[1] :] < 0)[..., None], value) for each in tensors]
        for actual, usual in zip(run(*spoilt, 1, ids), expected, strict=True):
            assert torch.equal(actual, usual)


def test_other_sequences_change_no_bit(small_tiles):
    """A sequence packed behind others gives what it gives alone."""
    tensors = make(1, 120, 120, 4, torch.float32)
    ids = torch.tensor([[0] * 37 + [1] * 70 + [2] * 13], dtype=torch.int32)
    whole = run(*tensors, 1, ids)
    alone = run(*(each[:, 37:107] for each in tensors), 1, torch.zeros(1, 70, dtype=torch.int32))
    for actual, usual in zip((whole[0], *whole[2:]), (alone[0], *alone[2:]), strict=True):
        assert relative_error(actual[:, 37:107], usual) <= 4 * torch.finfo(torch.float32).eps
    changed = [torch.cat((torch.randn_like(each[:, :37]), each[:, 37:]), dim=1) for each in tensors]
    for actual, usual in zip(run(*changed, 1, ids), whole, strict=True):
        dim = 2 if actual.shape[2] == 120 else 1  # lse is [batch, num_heads, time]
        assert torch.equal(actual.narrow(dim, 37, 83), usual.narrow(dim, 37, 83))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_twice(dtype):
    tensors, ids = make(1, 130, 130, 8, dtype), make_segments("packed", 1, 130)
    for first, second in zip(run(*tensors, 2, ids), run(*tensors, 2, ids), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("scale", (30.0, 1e6))
def test_extreme_scores(scale):
    """Up to 1e12, where float32 has no fractions: one key wins, and nothing overflows."""
    tensors, ids = make(1, 70, 70, 8, torch.float32, scale), make_segments("holes", 1, 70)
    actual = run(*tensors, 2, ids)
    assert all(each.isfinite().all() for each in actual[:1] + actual[2:])
    truth = formula(*(tensor.double() for tensor in tensors), 2, ids)
    assert relative_error(actual[0], truth[0]) <= 1e-5
    # The backward makes the weights anew, each from a score that may be rounded otherwise than in the forward.
    do, q, k, _ = tensors
    weights = uncertain(q, k, 2, ids, torch.float32)
    bound = joined(weights.transpose(2, 3) @ split((do,), 2)[0].abs())
    assert ((actual[4] - truth[4]).abs() <= bound).all()


def test_extreme_scores_of_halves_stay_finite():
    """Scores of 1e5 are past float16, but not past the sums' float32."""
    assert all(each.isfinite().all() for each in run(*make(1, 70, 70, 8, torch.float16, 200.0), 2, None))


@pytest.mark.parametrize("where", range(4))
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_visible(dtype, where):
    """In the gradients of what it meets, and in o, where it went there; but in no other head or row of the batch."""
    tensors = make(2, 9, 9, 8, dtype)
    tensors[where][0, 4, 1] = float("nan")
    o, _, *gradients = run(*tensors, 2, None)
    assert o[0, 4, :4].isnan().any() == (where > 0)
    assert any(each[0, :, :4].isnan().any() for each in gradients)
    assert all(each[0, :, 4:].isfinite().all() and each[1].isfinite().all() for each in (o, *gradients))
