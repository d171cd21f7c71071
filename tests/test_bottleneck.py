"""lora_linear, loramoe_linear: every implementation against float64, the published code, and under torch.compile."""

import golden_data
import pytest
import torch
import torch.nn.functional as F
from bottleneck_cases import DTYPES, FUSED, gradients, make, restated
from hypothesis import given, settings
from hypothesis import strategies as st

from gci_kernels import ops
from gci_kernels.accuracy import error_bound, relative_error

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.smoke
@pytest.mark.parametrize("impl", ("reference", *FUSED))
@pytest.mark.parametrize("top_k", (None, 1, 3))
@pytest.mark.parametrize("shape", [(130,), (1,), (7,), (2, 3, 5)], ids=str)
def test_loramoe_float64_equals_restatement(impl, top_k, shape):
    arguments = make(shape)
    expected = gradients(restated, arguments, top_k=top_k)
    actual = gradients(ops.loramoe_linear, arguments, top_k=top_k, impl=impl)
    for name in expected:
        # top_k=1 makes every gate 1 and the router's gradient 0: the scale is 1 where the truth is smaller.
        assert (actual[name] - expected[name]).norm() < 1e-10 * (1 + expected[name].norm()), name


@pytest.mark.smoke
@pytest.mark.parametrize("impl", ("reference", *FUSED))
def test_lora_float64_equals_formula(impl):
    def formula(x, weight, bias, A, B, scaling):
        return x @ weight.T + bias + scaling * x @ A.T @ B.T

    arguments = make((3, 11), experts=0, r=5)
    expected, actual = gradients(formula, arguments), gradients(ops.lora_linear, arguments, impl=impl)
    for name in expected:
        assert relative_error(actual[name], expected[name]) < 1e-10, name


@pytest.mark.smoke
@pytest.mark.parametrize("impl", ("reference", *FUSED))
@pytest.mark.parametrize("name", golden_data.LORAMOE)
def test_published_loramoe(impl, name):
    """Outputs, balance loss and gradients of the published layer, whose softmax and balance loss are float32."""
    meta, golden = golden_data.load(name)
    experts, r, _ = golden["A"].shape
    x, A, B, router = (
        t.clone().requires_grad_()
        for t in (golden["x"], golden["A"].flatten(0, 1), golden["B"].permute(1, 0, 2).flatten(1), golden["router"])
    )
    y, gates = ops.loramoe_linear(
        x, golden["weight"], golden.get("bias"), A, B, router, scaling=float(meta["lora_alpha"]) / r, impl=impl
    )
    balance = float(meta["balance_weight"]) * ops.balance_loss(
        gates, golden["task_types"], delta=float(meta["balance_delta"]), num_experts=experts
    )
    ((y * golden["dy"]).sum() + balance).backward()
    actual = {
        "y": y, "balance_loss": balance.reshape(1), "dx": x.grad, "dA": A.grad.view(golden["A"].shape),
        "dB": B.grad.view(-1, experts, r).permute(1, 0, 2), "drouter": router.grad,
    }  # fmt: skip
    for tensor, value in actual.items():
        assert relative_error(value, golden[tensor]) < 1e-5, tensor


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    "case",
    [
        dict(tokens=(1,), experts=8),
        dict(tokens=(7,), experts=1, r=16),
        dict(tokens=(130,), in_features=2100, out_features=33, experts=8),
        dict(tokens=(130,), in_features=96, out_features=272, experts=3, r=7),
        dict(tokens=(2, 65), in_features=64, out_features=48, experts=0, r=16),
        dict(tokens=(67,), in_features=17, out_features=19, experts=0, r=1),
    ],
    ids=str,
)
def test_error_at_most_twice_plain_pytorch(impl, dtype, case):
    if impl == "native" and dtype == torch.float16:
        with pytest.raises(ValueError, match="impl='native' cannot run"):
            ops.lora_linear(**make(experts=0, dtype=dtype), scaling=1.0, impl=impl)
        return
    arguments = make(**case, dtype=dtype)
    function = ops.loramoe_linear if "router" in arguments else ops.lora_linear
    wide = {k: None if v is None else v.double() for k, v in arguments.items()}
    truth = gradients(function, wide, impl="reference")
    plain = gradients(function, arguments, impl="reference")
    actual = gradients(function, arguments, impl=impl)
    for name in truth:
        bound = error_bound(relative_error(plain[name], truth[name]), dtype)
        assert relative_error(actual[name], truth[name]) <= bound, name


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("x_dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("adapter_dtype", (torch.bfloat16, torch.float32))
def test_adapter_in_another_dtype(impl, x_dtype, adapter_dtype):
    arguments = make(dtype=x_dtype) | {
        k: v.to(adapter_dtype) for k, v in make(dtype=torch.float32).items() if k in ("A", "B", "router")
    }
    actual = gradients(ops.loramoe_linear, arguments, impl=impl)
    truth = gradients(ops.loramoe_linear, {k: v.double() for k, v in arguments.items()}, impl="reference")
    plain = gradients(ops.loramoe_linear, arguments, impl="reference")
    assert actual["output 0"].dtype == x_dtype and actual["output 1"].dtype == torch.float32
    for name in ("A", "B", "router"):
        assert actual["d" + name].dtype == adapter_dtype
    for name in truth:
        bound = error_bound(relative_error(plain[name], truth[name]), x_dtype)
        assert relative_error(actual[name], truth[name]) <= bound, name


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_strided_and_expanded_inputs(impl, dtype):
    plain = make((6, 10), dtype=dtype)
    wide = torch.randn(6, 10, 2 * 67, dtype=dtype)
    strided = {
        "every second column": wide[..., ::2],
        "row slice": wide[..., 3:70],
        "transposed tokens": torch.randn(10, 6, 67, dtype=dtype).transpose(0, 1),
        "feature first": torch.randn(67, 6, 10, dtype=dtype).permute(1, 2, 0),
        "one row for all": torch.randn(1, 1, 67, dtype=dtype).expand(6, 10, 67),
    }
    transposed = {k: plain[k].t().contiguous().t() for k in ("weight", "A", "B", "router")}
    for name, x in strided.items():
        for layout in ({}, transposed):
            arguments = plain | layout | {"x": x}
            dense = {k: v.contiguous() for k, v in arguments.items()}
            leaf = {k: v.detach().requires_grad_() for k, v in arguments.items()}
            y, gates = ops.loramoe_linear(**leaf, scaling=2.0, impl=impl)
            dy = torch.randn(45, 6, 10, dtype=dtype).permute(1, 2, 0)  # a strided dout too
            grads = torch.autograd.grad(y, list(leaf.values()), dy)
            leaf2 = {k: v.detach().requires_grad_() for k, v in dense.items()}
            y2, _ = ops.loramoe_linear(**leaf2, scaling=2.0, impl="reference")
            grads2 = torch.autograd.grad(y2, list(leaf2.values()), dy.contiguous())
            tolerance = 1e-12 if dtype == torch.float64 else 2e-6
            assert relative_error(y, y2) < tolerance, name
            for key, a, b in zip(leaf, grads, grads2, strict=True):
                assert relative_error(a, b) < tolerance, (name, key)


@pytest.mark.parametrize("impl", ("reference", *FUSED))
def test_empty_batch(impl):
    arguments = make((0, 5), dtype=torch.float32)
    results = gradients(ops.loramoe_linear, arguments, impl=impl)
    assert results["output 0"].shape == (0, 5, 45) and results["output 1"].shape == (0, 5, 8)
    assert results["dx"].shape == (0, 5, 67)
    for name in ("dA", "dB", "drouter", "dweight", "dbias"):
        assert results[name].abs().sum() == 0, name


@pytest.mark.parametrize("impl", ("reference", *FUSED))
def test_update_alone(impl):
    arguments = make()
    update = ops.loramoe_linear(**arguments | {"weight": None, "bias": None}, scaling=2.0, impl=impl)[0]
    whole = ops.loramoe_linear(**arguments, scaling=2.0, impl=impl)[0]
    base = F.linear(arguments["x"], arguments["weight"], arguments["bias"])
    assert relative_error(base + update, whole) < 1e-12
    results = gradients(lambda **kw: ops.loramoe_linear(weight=None, bias=None, **kw, impl=impl),
                        {k: v for k, v in arguments.items() if k not in ("weight", "bias")})  # fmt: skip
    expected = gradients(lambda **kw: restated(weight=torch.zeros(45, 67, dtype=torch.float64), bias=None, **kw),
                         {k: v for k, v in arguments.items() if k not in ("weight", "bias")})  # fmt: skip
    for name in expected:
        assert relative_error(results[name], expected[name]) < 1e-10, name


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("trained", ["x", "weight", "bias", "A", "B", "router", "A B", "x router"])
def test_gradients_only_for_what_needs_them(impl, trained):
    arguments = make(dtype=torch.float32)
    expected = gradients(ops.loramoe_linear, arguments, impl=impl)
    names = trained.split()
    leaves = {k: v.clone().requires_grad_(k in names) for k, v in arguments.items()}
    outputs = ops.loramoe_linear(**leaves, scaling=2.0, impl=impl)
    g = torch.Generator().manual_seed(1)
    douts = [torch.randn(o.shape, generator=g, dtype=torch.float64).to(o) for o in outputs]
    used = [(o, d) for o, d in zip(outputs, douts, strict=True) if o.requires_grad]
    torch.autograd.backward([o for o, _ in used], [d for _, d in used])
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in names), name
        if name in names:
            assert relative_error(leaf.grad, expected["d" + name]) < 1e-6, name


@pytest.mark.parametrize("impl", FUSED)
def test_one_output_used(impl):
    for index in (0, 1):
        arguments = make()
        leaves = {k: v.clone().requires_grad_() for k, v in arguments.items()}
        other = {k: v.clone().requires_grad_() for k, v in arguments.items()}
        ops.loramoe_linear(**leaves, scaling=2.0, impl=impl)[index].square().sum().backward()
        restated(**other, scaling=2.0)[index].square().sum().backward()
        for name, leaf in leaves.items():
            expected = other[name].grad if other[name].grad is not None else torch.zeros_like(leaf)
            got = leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
            assert relative_error(got, expected) < 1e-10, (index, name)


@pytest.mark.parametrize("impl", FUSED)
def test_saved_tensors_are_not_overwritten(impl):
    """A second backward through the same graph gives the same bits, and inputs keep theirs."""
    arguments = make(dtype=torch.float32)
    leaves = {k: v.clone().requires_grad_() for k, v in arguments.items()}
    y, gates = ops.loramoe_linear(**leaves, scaling=2.0, dropout_p=0.3, impl=impl)
    loss = y.square().sum() + gates.square().sum()
    first = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
    second = torch.autograd.grad(loss, list(leaves.values()))
    for name, a, b in zip(leaves, first, second, strict=True):
        assert torch.equal(a, b), name
    for name, leaf in leaves.items():
        assert torch.equal(leaf, arguments[name]), name


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_saved_for_backward_is_x_and_the_projection(dtype):
    arguments = make((64,), in_features=96, out_features=80, dtype=dtype)
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    leaves = {k: v.requires_grad_(k in ("A", "B", "router")) for k, v in arguments.items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ops.loramoe_linear(**leaves, scaling=2.0)
    inputs = {v.untyped_storage().data_ptr() for v in leaves.values()}
    extra = [t for pointer, t in saved.items() if pointer not in inputs and t.numel()]
    assert [tuple(t.shape) for t in extra] == [(64, 8 * 4 + 8)]


@pytest.mark.parametrize("impl", FUSED)
def test_same_bits_twice(impl):
    arguments = make((300,), in_features=256, out_features=200, dtype=torch.float32)
    first, second = (gradients(ops.loramoe_linear, arguments, impl=impl) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("impl", ("reference", *FUSED))
def test_autocast_runs_in_its_dtype_and_keeps_parameter_dtypes(impl):
    arguments = make(dtype=torch.float32)
    leaves = {k: v.clone().requires_grad_() for k, v in arguments.items()}
    with torch.autocast("cpu", torch.bfloat16):
        y, gates = ops.loramoe_linear(**leaves, scaling=2.0, impl=impl)
    assert y.dtype == torch.bfloat16 and gates.dtype == torch.float32
    y.float().square().sum().backward()
    truth, _ = ops.loramoe_linear(**arguments, scaling=2.0, impl="reference")
    assert relative_error(y, truth) < 2e-2
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves.values())


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 40), in_features=st.integers(1, 70), out_features=st.integers(1, 70), r=st.integers(1, 9),
    experts=st.integers(0, 9), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    bias=st.booleans(), data=st.data(),
)  # fmt: skip
def test_native_equals_reference_for_any_shape(tokens, in_features, out_features, r, experts, dtype, bias, data):
    arguments = make((tokens,), in_features, out_features, r, experts, dtype, bias)
    # In bfloat16 the library rounds the router's logits, and so may choose other experts: there, it chooses all.
    options = {"top_k": data.draw(st.none() | st.integers(1, experts))} if experts and dtype != torch.bfloat16 else {}
    function = ops.loramoe_linear if experts else ops.lora_linear
    actual = gradients(function, arguments, impl="native", **options)
    expected = gradients(function, arguments, impl="aten", **options)
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 8e-2}[dtype]
    for name in expected:
        scale = 1 + expected[name].double().norm()
        assert (actual[name].double() - expected[name].double()).norm() <= tolerance * scale, name


BAD = [
    (dict(A=torch.zeros(0, 67)), ValueError, "A must have r >= 1"),
    (dict(A=torch.zeros(30, 67), B=torch.zeros(45, 30)), ValueError, "num_experts=8"),
    (dict(A=torch.zeros(32, 66)), ValueError, r"A must be \[any, 67\]"),
    (dict(B=torch.zeros(45, 31)), ValueError, r"B must be \[any, 32\]"),
    (dict(weight=torch.zeros(44, 67)), ValueError, r"weight must be \[45, 67\]"),
    (dict(bias=torch.zeros(44)), ValueError, r"bias must be \[45\]"),
    (dict(router=torch.zeros(0, 67)), ValueError, "router must have 1 to 256 rows"),
    (dict(router=torch.zeros(257, 67)), ValueError, "router must have 1 to 256 rows"),
    (dict(router=torch.zeros(8, 67, 1)), ValueError, r"router must be \[any, 67\]"),
    (dict(x=torch.zeros(3, 0)), ValueError, "x must be"),
    (dict(x=torch.zeros(3, 67, dtype=torch.int64)), TypeError, "x must be floating point"),
    (dict(x=[1.0]), TypeError, "x must be a tensor"),
    (dict(A=None), TypeError, "A must be a tensor"),
    (dict(A=torch.zeros(32, 67, dtype=torch.int32)), TypeError, "A must be floating point"),
    (dict(weight=torch.zeros(45, 67, dtype=torch.bfloat16)), TypeError, "weight must have x's dtype torch.float32"),
    (dict(A=torch.zeros(32, 67, device="meta")), ValueError, "A must be on x's device cpu, got meta"),
    (dict(x=torch.zeros(3, 67, device="meta")), ValueError, "A must be on x's device meta, got cpu"),
    (dict(weight=None), ValueError, "bias must be None"),
    (dict(scaling=float("nan")), ValueError, "scaling must be finite, got nan"),
    (dict(scaling="2"), TypeError, "scaling must be a number"),
    (dict(dropout_p=1.0), ValueError, r"dropout_p must be in \[0, 1\)"),
    (dict(dropout_p=-0.1), ValueError, r"dropout_p must be in \[0, 1\)"),
    (dict(top_k=0), ValueError, r"top_k must be None or an integer in \[1, num_experts=8\]"),
    (dict(top_k=9), ValueError, "top_k"),
    (dict(top_k=1.5), ValueError, "top_k"),
    (dict(impl="fast"), ValueError, "impl='fast' is unknown; allowed: 'auto', 'reference', 'aten', 'upcast', 'native'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        ops.loramoe_linear(**{**make(dtype=torch.float32), "scaling": 2.0, **change})
