"""Plans are made once for a class of numbers of tokens, and anew where what is proved on a GPU changes."""

import pytest
import torch
from toy_adapters import adapted, each_method, logits

from gci_kernels import impl as implementations
from gci_kernels.hardware import KERNELS, records
from gci_kernels.ops.bottleneck import plan
from gci_kernels.ops.upcast import HALVES


@pytest.fixture
def made(monkeypatch):
    """The numbers of tokens for which a plan was made."""
    calls, choose = [], plan.choose_plan

    def counted(impl, tokens, *others):
        calls.append(tokens)
        return choose(impl, tokens, *others)

    monkeypatch.setattr(plan, "choose_plan", counted)
    monkeypatch.setattr(plan, "_plans", {})
    return calls


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
@pytest.mark.parametrize("impl", ("auto", "native", "aten", "upcast"))
def test_what_is_remembered_is_what_would_be_chosen(made, dtype, impl):
    if impl == "upcast" and dtype not in HALVES or impl == "native" and dtype == torch.float16:
        with pytest.raises(ValueError, match="cannot run here"):
            plan.plan_for(impl, 3, dtype, "cpu", "gate")
        return
    for tokens in (*range(70), 255, 256, 257, 511, 512, 513, 10**6):
        assert plan.plan_for(impl, tokens, dtype, "cpu", "gate") == plan.choose_plan(impl, tokens, dtype, "cpu", "gate")
    remembered = len(plan._plans)
    assert remembered <= len(plan._EDGES) + 1
    plan.plan_for(impl, 300, dtype, "cpu", "gate")
    assert len(plan._plans) == remembered


def test_on_a_gpu_it_waits_for_lasting_answers_and_follows_them(made, monkeypatch):
    monkeypatch.setattr(implementations, "_HAS_TRITON", True)
    monkeypatch.setattr(records, "_current_index", lambda: 0)
    monkeypatch.setattr(records, "_answers", {})
    monkeypatch.setattr(records, "_ask", lambda kernel, index: False)  # as while a graph is captured

    def ask():
        return plan.plan_for("auto", 4096, torch.bfloat16, "cuda", "gate")

    assert set(ask()) == set(ask()) == {"aten"} and made == [4096, 4096]
    for kernel in KERNELS:
        records._answers[kernel, 0] = True
    assert set(ask()) == set(ask()) == {"triton"} and len(made) == 3
    records._answers["gate", 0] = False
    assert ask().mix == "triton"  # nobody has said that it changed
    monkeypatch.setattr(records, "version", records.version + 1)
    assert ask().mix == "aten" and ask().project == "triton" and len(made) == 4
    records._answers.update({(kernel, 1): False for kernel in KERNELS})
    monkeypatch.setattr(records, "_current_index", lambda: 1)
    assert set(ask()) == {"aten"}


@each_method
def test_an_unknown_implementation_is_named(method):
    model = adapted(method)
    for layer in model.modules():
        if hasattr(layer, "gci_impl"):
            layer.gci_impl = "foo"
    with pytest.raises(ValueError, match=r"impl='foo' is unknown; allowed: 'auto'"):
        logits(model)
