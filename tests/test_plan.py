"""Plans are made once for a class of numbers of tokens, and anew where what is proved on a GPU changes."""

import pytest
import torch
from toy_adapters import adapted, each_method, logits
from toy_gpu import TIMES

from gci_kernels import impl as implementations
from gci_kernels import ops
from gci_kernels.hardware import KERNELS, proving, records
from gci_kernels.ops.attention import api as attention_api
from gci_kernels.ops.attention.plan import choose_attention
from gci_kernels.ops.bottleneck import api as bottleneck_api
from gci_kernels.ops.bottleneck import plan
from gci_kernels.ops.decode import Group, choose_decode, has_kernels, step
from gci_kernels.ops.row_linear import api as row_linear_api
from gci_kernels.ops.row_linear import choose_form
from gci_kernels.ops.upcast import HALVES

HERE = dict(device=torch.device("cpu"), dropout=False)


@pytest.fixture
def made(monkeypatch):
    """The numbers of tokens for which a plan was made."""
    calls, choose = [], plan.choose_plan

    def counted(impl, tokens, *others, **options):
        calls.append(tokens)
        return choose(impl, tokens, *others, **options)

    monkeypatch.setattr(plan, "choose_plan", counted)
    monkeypatch.setattr(plan, "_plans", {})
    return calls


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
@pytest.mark.parametrize("impl", ("auto", "native", "aten", "upcast"))
def test_what_is_remembered_is_what_would_be_chosen(made, dtype, impl):
    if impl == "upcast" and dtype not in HALVES or impl == "native" and dtype == torch.float16:
        with pytest.raises(ValueError, match="cannot run here"):
            plan.plan_for(impl, 3, dtype, "cpu", "gate", **HERE)
        return
    for tokens in (*range(70), 255, 256, 257, 511, 512, 513, 10**6):
        remembered = plan.plan_for(impl, tokens, dtype, "cpu", "gate", **HERE)
        assert remembered == plan.choose_plan(impl, tokens, dtype, "cpu", "gate")
    remembered = len(plan._plans)
    assert remembered <= len(plan._EDGES) + 1
    plan.plan_for(impl, 300, dtype, "cpu", "gate", **HERE)
    assert len(plan._plans) == remembered


def test_on_a_gpu_it_waits_for_lasting_answers_and_follows_them(made, imagined_gpu, self_checks, monkeypatch):
    monkeypatch.setattr(implementations, "_HAS_TRITON", True)

    def ask(tokens=4096, index=0, dropout=True):
        where = dict(device=torch.device("cuda", index), dropout=dropout)
        return plan.plan_for("auto", tokens, torch.bfloat16, "cuda", "gate", **where)

    monkeypatch.setattr(proving, "_capturing", lambda: True)  # while a graph is captured, nothing can be found out
    assert set(ask()) == set(ask()) == {"aten"} and made == [4096, 4096]
    monkeypatch.setattr(proving, "_capturing", lambda: False)
    with pytest.warns(RuntimeWarning, match="'expand' failed"):
        assert ask().key == "triton/triton/aten/triton/triton" and len(made) == 3
    for _ in range(2):
        assert ask().key == ask(1024).key == ask(10**6).key == "triton/triton/aten/triton/triton"
        assert set(ask(1)) == set(ask(1023)) == {"aten"}
    assert len(made) == 5, "one for each class of numbers of tokens"
    records.starts["gate", torch.bfloat16, True, 0] = None
    assert ask().key == "triton/aten/aten/triton/triton"
    assert ask(index=1).key == "triton/triton/aten/triton/triton", "another GPU of the kind has its records"
    assert ask(dropout=False).dropout == "aten" and self_checks.count("dropout") == 1


def test_each_gpu_is_asked_for_its_own_tensors(imagined_gpu, monkeypatch):
    """Two of different kinds; whichever is the current one."""
    monkeypatch.setattr(implementations, "_HAS_TRITON", True)
    monkeypatch.setattr(records, "gpu", lambda device: (f"Imagined {device.index}", "sm_90"))
    monkeypatch.setattr(plan, "_plans", {})
    for kernel in KERNELS:
        for index in (0, 1):
            record = records.make_record(kernel, torch.device("cuda", index), index == 1, times=TIMES)
            records.keep(record)
    for current in (0, 1):
        monkeypatch.setattr(proving, "_current_index", lambda current=current: current)
        for index, expected in ((0, "aten"), (1, "triton"), (0, "aten")):
            device, tokens, dtype = torch.device("cuda", index), 4096, torch.bfloat16
            made = plan.plan_for("auto", tokens, dtype, "cuda", "gate", device=device, dropout=True)
            assert (
                set(made) == set(plan.choose_plan("auto", tokens, dtype, "cuda", "gate", device=device)) == {expected}
            )
            where = dict(tokens=tokens, dtype=dtype, device_type="cuda", device=device)
            assert choose_attention("auto", **where) == expected
            assert choose_form("auto", share=0.1, keep=False, **where) == ("triton" if index else "merge")
            step = choose_decode(columns=8, experts=1, adapter_dtype=dtype, head=4, **where | {"tokens": 1})
            assert (step is None) == (index == 0)
            assert [has_kernels(dtype, "cuda", attends, device) for attends in (False, True)] == [index == 1] * 2


def test_calls_ask_about_the_device_of_x(monkeypatch):
    asked = []

    def spy(module, name):
        own = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **where: asked.append((name, where)) or own(*args, **where))

    spy(bottleneck_api, "plan_for")
    spy(row_linear_api, "choose_form")
    spy(attention_api, "choose_attention")
    spy(step, "choose_decode")
    x, weight, A, B = torch.randn(5, 8), torch.randn(6, 8), torch.randn(3, 8), torch.randn(6, 3)
    for dropout_p in (0.0, 0.1):
        ops.lora_linear(x, weight, None, A, B, scaling=1.0, dropout_p=dropout_p)
    ops.loki_linear(x, weight, None, torch.randn(2, 8), torch.tensor([1, 4]), None)
    ops.low_rank_attention(*[torch.randn(1, 5, 4)] * 3, num_heads=2)
    step.plan_step(x, weight, None, [Group(A, B, 1.0, 0, 5)])
    assert [name for name, _ in asked] == ["plan_for", "plan_for", "choose_form", "choose_attention", "choose_decode"]
    assert all(where["device"] == x.device for _, where in asked)
    assert [where["dropout"] for _, where in asked[:2]] == [False, True]


@each_method
def test_an_unknown_implementation_is_named(method):
    model = adapted(method)
    for layer in model.modules():
        if hasattr(layer, "gci_impl"):
            layer.gci_impl = "foo"
    with pytest.raises(ValueError, match=r"impl='foo' is unknown; allowed: 'auto'"):
        logits(model)
