"""loki_linear: every implementation against float64, the published layer, under torch.compile; bad input."""

import golden_data
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gci_kernels import ops
from gci_kernels.accuracy import error_bound, relative_error
from gci_kernels.ops.row_linear import FORMS, MergedRows, choose_form

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LIBRARY_FORMS = tuple(form for form in FORMS if form not in ("upcast", "triton"))


def make(tokens=(130,), in_features=67, out_features=45, k=9, dtype=torch.float64, bias=True, seed=0):
    """Arguments of loki_linear, the trained rows far from the frozen ones; positions in no order."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype)

    return {
        "x": draw(*tokens, in_features),
        "weight": draw(out_features, in_features, scale=in_features**-0.5),
        "bias": draw(out_features) if bias else None,
        "active_weight": draw(k, in_features, scale=in_features**-0.5),
        "positions": torch.randperm(out_features, generator=g)[:k],
        "active_bias": draw(k) if bias else None,
    }


def call(x, weight, bias, active_weight, positions, active_bias, *, form=None, **options):
    """loki_linear, or one form of it."""
    if form is None:
        return ops.loki_linear(x, weight, bias, active_weight, positions, active_bias, **options)
    if form == "kept":
        weight = MergedRows().renewed(weight, active_weight, positions, x.dtype)
    return torch.ops.gci_kernels.row_linear(x, weight, bias, active_weight, positions, active_bias, form)


def gradients(function, arguments, trained=("x", "active_weight", "active_bias"), **options):
    """The output of `function` and the gradients of what is trained, for a fixed random dout."""
    leaves = {k: v if v is None else v.detach().clone().requires_grad_(k in trained) for k, v in arguments.items()}
    y = function(**leaves, **options)
    g = torch.Generator().manual_seed(1)
    y.backward(torch.randn(y.shape, generator=g, dtype=torch.float64).to(y))
    results = {"d" + k: leaf.grad for k, leaf in leaves.items() if leaf is not None and k in trained}
    return {"y": y.detach()} | results


def restated(x, weight, bias, active_weight, positions, active_bias):
    """Section 3 of the design, one row at a time."""
    columns = []
    for row in range(weight.shape[0]):
        here = (positions == row).nonzero()
        source, b = (weight[row], bias) if not len(here) else (active_weight[int(here)], active_bias)
        index = row if not len(here) else int(here)
        columns.append(x @ source + (0 if b is None else b[index]))
    return torch.stack(columns, -1)


@pytest.mark.parametrize("form", (None, *LIBRARY_FORMS))
@pytest.mark.parametrize("shape", [(130,), (1,), (7,), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("k", (1, 9, 45))
@pytest.mark.parametrize("bias", (True, False))
def test_float64_equals_restatement(form, shape, k, bias):
    arguments = make(shape, k=k, bias=bias)
    expected, actual = gradients(restated, arguments), gradients(call, arguments, form=form)
    for name in expected:
        assert relative_error(actual[name], expected[name]) < 1e-12, name


@pytest.mark.smoke
@pytest.mark.parametrize("impl", ("reference", "aten", "auto"))
@pytest.mark.parametrize("form", (None, *LIBRARY_FORMS))
@pytest.mark.parametrize("name", golden_data.LOKI)
def test_published_split_layer(impl, form, name):
    golden = golden_data.load(name)[1]
    positions, bias = golden["positions"], golden.get("bias")
    arguments = {
        "x": golden["x"], "weight": golden["weight"], "bias": bias, "active_weight": golden["weight"][positions],
        "positions": positions, "active_bias": None if bias is None else bias[positions],
    }  # fmt: skip
    leaves = {k: None if v is None else v.clone() for k, v in arguments.items()}
    trained = [leaf for leaf in ("x", "active_weight", "active_bias") if leaves[leaf] is not None]
    for leaf in trained:
        leaves[leaf].requires_grad_()
    y = call(**leaves, form=form) if form else call(**leaves, impl=impl)
    grads = torch.autograd.grad(y, [leaves[leaf] for leaf in trained], golden["dy"])
    actual = {"y": y, **dict(zip(["dx", "dactive", "dactive_bias"], grads, strict=False))}
    for tensor, value in actual.items():
        assert relative_error(value, golden[tensor]) < 1e-10, tensor


@pytest.mark.parametrize("form", LIBRARY_FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    "case",
    [
        dict(tokens=(1,)),
        dict(tokens=(7,), k=45, bias=False),
        dict(tokens=(130,), in_features=2100, out_features=33, k=3),
        dict(tokens=(2, 65), in_features=64, out_features=272, k=27),
        dict(tokens=(67,), in_features=17, out_features=1, k=1),
    ],
    ids=str,
)
def test_error_at_most_twice_plain_pytorch(form, dtype, case):
    arguments = make(**case, dtype=dtype)
    wide = {k: v.double() if v is not None and v.is_floating_point() else v for k, v in arguments.items()}
    truth = gradients(call, wide, impl="reference")
    plain, actual = gradients(call, arguments, impl="reference"), gradients(call, arguments, form=form)
    for name in truth:
        bound = error_bound(relative_error(plain[name], truth[name]), dtype)
        assert relative_error(actual[name], truth[name]) <= bound, name


@pytest.mark.parametrize("form", LIBRARY_FORMS)
@pytest.mark.parametrize("x_dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("active_dtype", (torch.bfloat16, torch.float32))
def test_active_rows_in_another_dtype(form, x_dtype, active_dtype):
    arguments = make(dtype=x_dtype)
    arguments |= {k: arguments[k].to(active_dtype) for k in ("active_weight", "active_bias")}
    wide = {k: v.to(x_dtype).double() if v.is_floating_point() else v for k, v in arguments.items()}
    truth, plain = gradients(call, wide, impl="reference"), gradients(call, arguments, impl="reference")
    actual = gradients(call, arguments, form=form)
    assert actual["y"].dtype == x_dtype and actual["dactive_weight"].dtype == active_dtype
    assert actual["dactive_bias"].dtype == active_dtype
    for name in truth:
        bound = error_bound(relative_error(plain[name], truth[name]), x_dtype)
        assert relative_error(actual[name], truth[name]) <= bound, name


@pytest.mark.parametrize("form", LIBRARY_FORMS)
def test_strided_inputs_and_dout(form):
    plain = make((6, 10))
    wide = torch.randn(6, 10, 2 * 67, dtype=torch.float64)
    strided = {
        "every second column": wide[..., ::2],
        "row slice": wide[..., 3:70],
        "feature first": torch.randn(67, 6, 10, dtype=torch.float64).permute(1, 2, 0),
        "one row for all": torch.randn(1, 1, 67, dtype=torch.float64).expand(6, 10, 67),
    }
    transposed = {k: plain[k].t().contiguous().t() for k in ("weight", "active_weight")}
    transposed["positions"] = torch.stack((plain["positions"], plain["positions"]), 1)[:, 0]
    for name, x in strided.items():
        for layout in ({}, transposed):
            arguments = plain | layout | {"x": x.detach().requires_grad_()}
            arguments["active_weight"] = arguments["active_weight"].detach().requires_grad_()
            dy = torch.randn(45, 6, 10, dtype=torch.float64).permute(1, 2, 0)
            leaves = [arguments["x"], arguments["active_weight"]]
            actual, expected = call(**arguments, form=form), call(**arguments, impl="reference")
            grads, grads2 = torch.autograd.grad(actual, leaves, dy), torch.autograd.grad(expected, leaves, dy)
            for a, b in zip((actual, *grads), (expected, *grads2), strict=True):
                assert relative_error(a, b) < 1e-12, name


@pytest.mark.parametrize("form", (None, *LIBRARY_FORMS))
def test_empty_batch(form):
    results = gradients(call, make((0, 5)), form=form)
    assert results["y"].shape == (0, 5, 45) and results["dx"].shape == (0, 5, 67)
    assert results["dactive_weight"].abs().sum() == results["dactive_bias"].abs().sum() == 0


@pytest.mark.parametrize("form", LIBRARY_FORMS)
@pytest.mark.parametrize("trained", ["x", "active_weight", "active_bias", "x active_bias"])
def test_gradients_only_for_what_needs_them(form, trained):
    arguments = make()
    expected, actual = gradients(call, arguments, form=form), gradients(call, arguments, trained.split(), form=form)
    assert set(actual) == {"y", *("d" + name for name in trained.split())}
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("form", LIBRARY_FORMS)
def test_a_second_backward_gives_the_same_bits_and_inputs_keep_theirs(form):
    arguments = make(dtype=torch.float32)
    leaves = {k: v.clone().requires_grad_(k in ("x", "active_weight", "active_bias")) for k, v in arguments.items()}
    loss = call(**leaves, form=form).square().sum()
    trained = [leaf for leaf in leaves.values() if leaf.requires_grad]
    first, second = torch.autograd.grad(loss, trained, retain_graph=True), torch.autograd.grad(loss, trained)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    for name, leaf in leaves.items():
        assert torch.equal(leaf, arguments[name]), name


@pytest.mark.parametrize("merged", (None, MergedRows()))
def test_saved_for_backward_is_x_alone(merged):
    arguments, saved = make((64,), in_features=96, out_features=80), []

    def pack(tensor):
        saved.append(tensor.untyped_storage().data_ptr())
        return tensor

    leaves = {k: v.requires_grad_(k in ("active_weight", "active_bias")) for k, v in arguments.items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call(**leaves, merged=merged)
    alive = {leaves[name].untyped_storage().data_ptr() for name in ("weight", "active_weight", "positions")}
    if merged is not None:
        weight = merged.renewed(leaves["weight"], leaves["active_weight"], leaves["positions"], torch.float64)
        alive.add(weight.untyped_storage().data_ptr())
    assert set(saved) - alive == {leaves["x"].untyped_storage().data_ptr()}


def test_reference_gradcheck():
    a = make((3,), in_features=5, out_features=4, k=2)
    trained = [a[name].requires_grad_() for name in ("x", "active_weight", "active_bias")]
    torch.autograd.gradcheck(
        lambda x, w, b: ops.loki_linear(x, a["weight"], a["bias"], w, a["positions"], b, impl="reference"), trained
    )


def test_second_derivatives_are_those_of_the_formula():
    trained = ("x", "active_weight", "active_bias")
    arguments = {k: v.requires_grad_(k in trained) if v.is_floating_point() else v for k, v in make().items()}
    leaves = [arguments[name] for name in trained]

    def second(impl: str) -> list[torch.Tensor]:
        y = ops.loki_linear(**arguments, impl=impl)
        first = torch.autograd.grad(y.pow(3).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(d.square().sum() for d in first), leaves)

    for actual, expected in zip(second("aten"), second("reference"), strict=True):
        assert relative_error(actual, expected) < 1e-9


@pytest.mark.parametrize("form", LIBRARY_FORMS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("needs_grad", (True, False))
def test_opcheck_forward(form, dtype, bias, needs_grad):
    a = make((5,), in_features=12, out_features=9, k=4, dtype=dtype, bias=bias)
    for name in ("x", "active_weight", "active_bias"):
        if a[name] is not None:
            a[name].requires_grad_(needs_grad)
    torch.library.opcheck(torch.ops.gci_kernels.row_linear.default, (*a.values(), form))


@pytest.mark.parametrize("form", LIBRARY_FORMS)
@pytest.mark.parametrize("needs", [[True, True, True], [True, False, False], [False, True, False]])
def test_opcheck_backward(form, needs):
    a = make((5,), in_features=12, out_features=9, k=4, dtype=torch.float32)
    arguments = (torch.randn(5, 9), a["x"], a["weight"], a["active_weight"], a["positions"], form, needs)
    torch.library.opcheck(torch.ops.gci_kernels.row_linear_backward.default, arguments)


def test_compile_fullgraph():
    a, merged = make(dtype=torch.float32), MergedRows()

    def step(x, active_weight, active_bias):
        y = ops.loki_linear(
            x.sin(), a["weight"], a["bias"], active_weight, a["positions"], active_bias, merged=merged
        )  # fmt: skip
        return y.cos().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (16, 24, 500):
        leaves = [torch.randn(tokens, 67), a["active_weight"].clone(), a["active_bias"].clone()]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        expected = torch.autograd.grad(step(*leaves), leaves)
        for actual, value in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
            assert relative_error(actual, value) < 1e-5


@pytest.mark.parametrize("impl", ("reference", "aten", "auto"))
@pytest.mark.parametrize("merged", (None, MergedRows()))
def test_autocast_runs_in_its_dtype_and_keeps_parameter_dtypes(impl, merged):
    leaves = {
        k: v.requires_grad_(k in ("x", "active_weight", "active_bias")) for k, v in make(dtype=torch.float32).items()
    }
    with torch.autocast("cpu", torch.bfloat16):
        y = call(**leaves, impl=impl, merged=merged)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert relative_error(y, call(**leaves, impl="reference")) < 2e-2
    assert all(leaves[name].grad.dtype == torch.float32 for name in ("x", "active_weight", "active_bias"))


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 40), in_features=st.integers(1, 70), out_features=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), bias=st.booleans(),
    form=st.sampled_from(LIBRARY_FORMS), data=st.data(),
)  # fmt: skip
def test_any_shape(tokens, in_features, out_features, dtype, bias, form, data):
    k = data.draw(st.integers(1, out_features))
    arguments = make((tokens,), in_features, out_features, k, dtype, bias)
    actual, expected = gradients(call, arguments, form=form), gradients(call, arguments, impl="reference")
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 8e-2}[dtype]
    for name in expected:
        scale = 1 + expected[name].double().norm()
        assert (actual[name].double() - expected[name].double()).norm() <= tolerance * scale, name


def test_the_form_follows_tokens_and_who_keeps_a_copy():
    def form(tokens, *, keep=False, share=0.1, impl="auto", device_type="cpu", dtype=torch.float32, starts=None):
        return choose_form(
            impl, tokens=tokens, share=share, dtype=dtype, device_type=device_type, keep=keep, starts=starts or {}
        )

    assert form(2048, keep=True) == "kept" and form(1, keep=True) == "overwrite"
    assert form(2048) == "merge" and form(256) == "overwrite"
    gpu = dict(device_type="cuda", dtype=torch.bfloat16)
    assert form(8192, **gpu) == "merge" and form(8192, starts={"row_linear": 512}, **gpu) == "triton"
    assert form(8192, starts={"row_linear": 512}, keep=True, **gpu) == "kept"
    assert form(8192, starts={"row_linear": 512}, impl="aten", **gpu) == "merge"
    assert form(511, starts={"row_linear": 512}, **gpu) == "overwrite"
    assert form(8192, starts={"row_linear": None}, **gpu) == "merge"
    assert form(8192, starts={"row_linear": 512}, device_type="cuda", dtype=torch.float64) == "merge"


BAD = [
    (dict(positions=torch.tensor([0, 1, 45])), ValueError, "positions must be rows from 0 to 44, got 45"),
    (dict(positions=torch.tensor([0, -1, 4])), ValueError, "positions must be rows from 0 to 44, got -1"),
    (dict(positions=torch.tensor([7, 1, 7])), ValueError, "positions must be distinct, got 7 more than once"),
    (dict(positions=torch.zeros(0, dtype=torch.int64)), ValueError, r"positions must be \[k\] with k >= 1, got \[0\]"),
    (dict(positions=torch.zeros(1, 3, dtype=torch.int64)), ValueError, r"positions must be \[k\]"),
    (
        dict(positions=torch.tensor([1, 2])),
        ValueError,
        r"active_weight must be \[2, in\] like positions, got \[3, 67\]",
    ),
    (dict(positions=torch.tensor([1, 2, 3], dtype=torch.int32)), TypeError, "positions must be int64"),
    (dict(positions=[1, 2, 3]), TypeError, "positions must be a tensor, got list"),
    (
        dict(positions=torch.zeros(3, dtype=torch.int64, device="meta")),
        ValueError,
        "positions must be on x's device cpu",
    ),
    (dict(active_weight=torch.zeros(3, 66)), ValueError, r"active_weight must be \[any, 67\]"),
    (dict(active_weight=None), TypeError, "active_weight must be a tensor"),
    (dict(active_bias=torch.zeros(2)), ValueError, r"active_bias must be \[3\]"),
    (dict(bias=None), ValueError, "active_bias must be None where bias is None"),
    (dict(bias=torch.zeros(44)), ValueError, r"bias must be \[45\]"),
    (dict(weight=torch.zeros(45, 66)), ValueError, r"weight must be \[any, 67\]"),
    (dict(weight=torch.zeros(45, 67, dtype=torch.bfloat16)), TypeError, "weight must have x's dtype torch.float32"),
    (dict(weight=torch.zeros(45, 67, requires_grad=True)), ValueError, "weight must be frozen"),
    (dict(bias=torch.zeros(45, requires_grad=True)), ValueError, "bias must be frozen"),
    (dict(x=torch.zeros(3, 67, dtype=torch.int64)), TypeError, "x must be floating point"),
    (dict(x=[1.0]), TypeError, "x must be a tensor"),
    (dict(x=torch.zeros(3, 0)), ValueError, "x must be"),
    (dict(x=torch.zeros(3, 67, device="meta")), ValueError, "weight must be on x's device meta, got cpu"),
    (dict(impl="native"), ValueError, "impl='native' cannot run here: the products of loki_linear are the library's"),
    (dict(impl="triton"), ValueError, "impl='triton' cannot run here"),
    (dict(impl="fast"), ValueError, "impl='fast' is unknown"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        ops.loki_linear(**{**make(k=3, dtype=torch.float32), **change})
