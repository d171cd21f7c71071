"""ops.alora_linear: the formula restated in float64, every implementation against it, what it refuses."""

import pytest
import torch

from gci_kernels import native, ops
from gci_kernels.accuracy import error_bound, relative_error
from gci_kernels.ops import Sequence

FUSED = ("aten", "native")
DTYPES = (torch.float32, torch.bfloat16)


def make(batch=2, time=13, in_features=37, out_features=29, r=12, past=0, dtype=torch.float64, bias=True):
    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype)

    return {
        "x": draw(batch, time, in_features),
        "weight": draw(out_features, in_features, scale=in_features**-0.5),
        "bias": draw(out_features) if bias else None,
        "A": draw(r, in_features, scale=in_features**-0.5),
        "qkv": draw(3 * r, r, scale=r**-0.5),
        "B": draw(out_features, r, scale=r**-0.5),
    }, (draw(batch, past, 2 * r) if past else None)


def sequences(batch, keys, past):
    """Every kind of batch: whole rows, padding on either side and in between, packed, nothing at all."""
    mask = torch.ones(batch, keys, dtype=torch.int64)
    left, right, holes, nothing = (mask.clone() for _ in range(4))
    left[0, : keys // 2], right[0, keys // 2 :], holes[0, 1::3], nothing[0] = 0, 0, 0, 0
    packed = torch.cat((torch.arange(keys // 3), torch.arange(keys - keys // 3))).expand(batch, -1)
    return {
        "whole": None,
        **{
            name: Sequence.from_mask(m, past)
            for name, m in dict(left=left, right=right, holes=holes, nothing=nothing).items()
        },
        "packed": Sequence.from_position_ids(packed, past),
    }


def restated(x, weight, bias, A, qkv, B, *, num_heads, scaling, residual, sequence, past):
    """The definition token by token and head by head, with no library call that knows what attention is."""
    batch, time, _ = x.shape
    r, d = A.shape[0], A.shape[0] // num_heads
    z = x @ A.T
    q, k, v = (z @ part.T for part in qkv.split(r))
    before = 0 if past is None else past.shape[1]
    if before:
        k, v = torch.cat((past[..., :r], k), 1), torch.cat((past[..., r:], v), 1)
    rows = []
    for b in range(batch):
        for i in range(time):
            allowed = range(before + i + 1)
            if sequence is not None and sequence.segments is not None:
                own = sequence.segments[b]
                allowed = [j for j in allowed if own[j] == own[before + i] and own[before + i] >= 0]
            allowed, heads = list(allowed), []
            for h in range(num_heads):
                part = slice(h * d, (h + 1) * d)
                if not allowed:
                    heads.append(x.new_zeros(d))
                    continue
                scores = torch.stack([q[b, i, part] @ k[b, j, part] / d**0.5 for j in allowed])
                powers = (scores - scores.detach().max()).exp()
                heads.append((powers / powers.sum()) @ torch.stack([v[b, j, part] for j in allowed]))
            rows.append(torch.cat(heads))
    o = torch.stack(rows).view(batch, time, r)
    return x @ weight.T + bias + scaling * (o + z if residual else o) @ B.T


def gradients(function, tensors, dy):
    leaves = {name: None if t is None else t.detach().clone().requires_grad_() for name, t in tensors.items()}
    y = function(**leaves)
    y = y[0] if isinstance(y, tuple) else y
    wanted = [leaf for leaf in leaves.values() if leaf is not None]
    grads = torch.autograd.grad(y, wanted, dy.to(y.dtype))
    names = [f"d{name}" for name, leaf in leaves.items() if leaf is not None]
    return {"y": y.detach(), **dict(zip(names, grads, strict=True))}


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ("whole", "left", "right", "holes", "nothing", "packed"))
@pytest.mark.parametrize(("num_heads", "residual", "past"), [(3, False, 0), (1, True, 0), (12, True, 4), (4, False, 5)])
def test_restatement(kind, num_heads, residual, past):
    tensors, kept = make(past=past)
    sequence = sequences(2, past + 13, past)[kind]
    if kind == "whole" and past:
        sequence = Sequence(None, past)
    options = dict(num_heads=num_heads, scaling=2.0, residual=residual, sequence=sequence, past=kept)
    dy = torch.randn(2, 13, 29, dtype=torch.float64)
    truth = gradients(lambda **t: restated(**t, **options), tensors, dy)
    for impl in ("reference", *FUSED):
        actual = gradients(lambda **t: ops.alora_linear(**t, **options, impl=impl), tensors, dy)  # noqa: B023
        for name in truth:
            assert relative_error(actual[name], truth[name]) < 1e-10, (impl, name)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ("whole", "left", "packed"))
@pytest.mark.parametrize("dropout_p", (0.0, 0.3))
@pytest.mark.usefixtures("poisoned")
def test_no_worse_than_plain_pytorch(impl, dtype, kind, dropout_p):
    tensors, _ = make(2, 70, 96, 80, 16, dtype=dtype)
    options = dict(num_heads=4, scaling=2.0, sequence=sequences(2, 70, 0)[kind], dropout_p=dropout_p)
    dy = torch.randn(2, 70, 80, dtype=torch.float64)

    def run(impl, tensors):
        torch.manual_seed(1)
        return gradients(lambda **t: ops.alora_linear(**t, **options, impl=impl), tensors, dy)

    truth = run("reference", {name: t.double() for name, t in tensors.items()})
    plain, actual = run("reference", tensors), run(impl, tensors)
    for name in truth:
        assert relative_error(actual[name], truth[name]) <= error_bound(relative_error(plain[name], truth[name]), dtype)


@pytest.mark.parametrize("impl", ("reference", *FUSED))
def test_a_sequence_in_parts_equals_the_whole(impl):
    tensors, _ = make(2, 20)
    options = dict(num_heads=4, scaling=2.0, impl=impl)
    whole, kv = ops.alora_linear(**tensors, **options)
    x, kept, parts = tensors["x"], None, []
    for first, last in ((0, 7), (7, 8), (8, 20)):
        given = tensors | {"x": x[:, first:last]}
        y, new = ops.alora_linear(**given, **options, past=kept, sequence=Sequence(None, first))
        kept = new if kept is None else torch.cat((kept, new), 1)
        parts.append(y)
    assert relative_error(torch.cat(parts, 1), whole) < 1e-12 and relative_error(kept, kv) < 1e-12
    assert not kv.requires_grad


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("lead", ((9,), (0, 9), (2, 0), (1, 1)))
def test_shapes(impl, lead):
    tensors, _ = make()
    x = torch.randn(*lead, 37, dtype=torch.float64)
    given = tensors | {"x": x}
    dy = torch.randn(*lead, 29, dtype=torch.float64)
    options = dict(num_heads=3, scaling=2.0)
    batched = given | {"x": x if x.dim() == 3 else x.unsqueeze(0)}
    truth = gradients(
        lambda **t: ops.alora_linear(**t, **options, impl="reference"), batched, dy.view(*batched["x"].shape[:-1], 29)
    )
    actual = gradients(lambda **t: ops.alora_linear(**t, **options, impl=impl), given, dy)
    for name in truth:
        assert relative_error(actual[name], truth[name].view(actual[name].shape)) < 1e-10, name


@pytest.mark.parametrize("impl", FUSED)
def test_only_what_needs_a_gradient_gets_one(impl):
    tensors, _ = make(bias=False)
    for wanted in (("A",), ("qkv",), ("B",), ("x",), ("A", "qkv", "B")):
        leaves = {n: None if t is None else t.clone().requires_grad_(n in wanted) for n, t in tensors.items()}
        y, _ = ops.alora_linear(**leaves, num_heads=4, scaling=2.0, impl=impl)
        y.square().sum().backward()
        assert {name for name, leaf in leaves.items() if leaf is not None and leaf.grad is not None} == set(wanted)


def test_saved_for_backward_is_x_and_little_else():
    tensors, _ = make(2, 64, 96, 80, 16, dtype=torch.float32, bias=False)
    leaves = {n: None if t is None else t.requires_grad_(n in ("A", "qkv", "B")) for n, t in tensors.items()}
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ops.alora_linear(**leaves, num_heads=4, scaling=2.0)
    inputs = {t.untyped_storage().data_ptr() for t in leaves.values() if t is not None}
    extra = [t for pointer, t in saved.items() if pointer not in inputs and t.numel()]
    # z, o and the softmax's sums: 2 r + num_heads numbers a token.
    assert sum(t.numel() for t in extra) == 2 * 64 * (2 * 16 + 4)


@pytest.mark.parametrize(
    "dtype", (torch.float64, torch.float32, *([torch.bfloat16] if native.extension().has_bf16_products() else []))
)
@pytest.mark.parametrize("plan", ("aten/aten/aten/aten/aten", "aten/native/aten/aten/native"))
@pytest.mark.parametrize("past", (0, 3))
@pytest.mark.parametrize("with_dropout", (True, False))
def test_opcheck(plan, dtype, past, with_dropout):
    tensors, kept = make(2, 5, dtype=dtype, past=past)
    x, weight, bias, A, qkv, B = (t.requires_grad_() for t in tensors.values())
    segments = torch.zeros(2, 5 + past, dtype=torch.int32)
    seed, p = (torch.tensor(3), 0.5) if with_dropout else (None, 0.0)
    options = ("attention", [3, 1], 2.0, p, plan)
    inputs = (x, weight, bias, A, B, qkv, segments, kept, seed)
    torch.library.opcheck(torch.ops.gci_kernels.bottleneck.default, (*inputs, *options))
    with torch.no_grad():
        _, *saved, _ = torch.ops.gci_kernels.bottleneck(*inputs, *options)
    tensors = [t.detach() for t in (torch.randn(2, 5, 29, dtype=dtype), x, weight, A, B, qkv, segments)]
    arguments = (tensors[0], None, *tensors[1:], kept, seed, *saved, *options, [True] * 6)
    torch.library.opcheck(torch.ops.gci_kernels.bottleneck_backward.default, arguments)


def test_compile_fullgraph():
    tensors, _ = make(2, 16, dtype=torch.float32, bias=False)
    tensors.pop("bias")
    segments = torch.tensor([[0] * 7 + [1] * 9, [-1] * 3 + [0] * 13], dtype=torch.int32)

    def step(x, weight, A, qkv, B):
        y, kv = ops.alora_linear(
            x.sin(), weight, None, A, qkv, B, num_heads=4, scaling=2.0, sequence=Sequence(segments)
        )
        return y.cos().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    leaves = [t.detach().clone().requires_grad_() for t in tensors.values()]
    expected = torch.autograd.grad(step(*leaves), leaves)
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        assert relative_error(a, b) < 1e-5


BAD = [
    (dict(x=torch.zeros(2, 2, 13, 37)), ValueError, r"x must be \[batch, time, in\] or \[time, in\]"),
    (dict(x=torch.zeros(2, 13, 37, device="meta")), ValueError, "A must be on x's device meta, got cpu"),
    (dict(qkv=torch.zeros(36, 11)), ValueError, r"qkv must be \[36, 12\], got \[36, 11\]"),
    (dict(num_heads=5), ValueError, "num_heads must divide r=12, got 5"),
    (dict(num_heads=0), ValueError, "num_heads must divide r=12, got 0"),
    (dict(num_heads=2.0), TypeError, "num_heads must be an integer"),
    (dict(past=torch.zeros(2, 3, 23)), ValueError, r"past must be \[2, any, 24\], got \[2, 3, 23\]"),
    (dict(past=torch.zeros(1, 3, 24)), ValueError, r"past must be \[2, any, 24\]"),
    (dict(past=torch.zeros(2, 3, 24).double()), TypeError, "past must have x's dtype torch.float32"),
    (dict(sequence=Sequence(None, 2)), ValueError, "sequence.past must be keys - time = 0, got 2"),
    (dict(sequence=Sequence(torch.zeros(2, 12, dtype=torch.int32))), ValueError, r"segments must be \[2, 13\]"),
    (dict(sequence="packed"), TypeError, "sequence must be a Sequence or None, got str"),
    (dict(impl="fast"), ValueError, "impl='fast' is unknown"),
    (dict(impl="triton"), ValueError, "impl='triton' cannot run here"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_input_is_named(change, error, message):
    arguments = make(dtype=torch.float32)[0] | dict(num_heads=4, scaling=2.0) | change
    with pytest.raises(error, match=message):
        ops.alora_linear(**arguments)
