"""patch(model, impl=...): kept by every adapted layer, given to its op, reported, and undone."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from toy_transforms import ALONE, METHODS, MOE, TARGETS, ids, llama, net, trained

from gci_kernels import LoRAMoEConfig, patch, report, unpatch
from gci_kernels.accuracy import relative_error
from gci_kernels.impl import IMPLS
from gci_kernels.tuners import fusion

pytestmark = pytest.mark.usefixtures("one_thread")


def adapted(model: nn.Module) -> list:
    return [module for module in model.modules() if hasattr(module, "base_layer")]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("impl", ("reference", "aten"))
def test_same_numbers_through_what_was_asked_for(method, impl, monkeypatch):
    """In training, in decoding steps, which are kernels of another kind, and in generation."""
    auto, model = llama(method), llama(method, impl=impl)
    plans = {line.plan for line in report(model)}
    if method == "loki":
        assert plans == {"rows=reference" if impl == "reference" else "rows=kept"}
    else:
        assert plans == {" ".join(f"{s}={impl}" for s in ("project", "mix", "expand", "reduce", "dropout"))}
    assert {line.decode for line in report(model)} == {None}
    takes = fusion.takes_steps
    monkeypatch.setattr(fusion, "takes_steps", lambda *args: takes(*args) and pytest.fail("a decoding step"))
    tokens = model.generate(ids(2, 5), attention_mask=torch.ones(2, 5), max_new_tokens=4, do_sample=False)
    monkeypatch.undo()
    losses = []
    for each in (model, auto):
        loss = each(input_ids=ids(2, 5), labels=ids(2, 5), use_cache=False).loss
        loss.backward()
        losses.append(loss)
    assert relative_error(*losses) < 1e-5
    for parameter, expected in zip(trained(model).values(), trained(auto).values(), strict=True):
        assert expected.grad.any() and relative_error(parameter.grad, expected.grad) < 1e-4
    assert torch.equal(
        tokens, auto.generate(ids(2, 5), attention_mask=torch.ones(2, 5), max_new_tokens=4, do_sample=False)
    )


@pytest.mark.parametrize("method", METHODS)
def test_it_reaches_the_op(method):
    """Nothing of ours runs: neither an operator nor a step."""
    model = llama(method, impl="reference")
    names = []
    with Seen(names):
        model(input_ids=ids(2, 5), labels=ids(2, 5)).loss.backward()
        with torch.no_grad():
            model(input_ids=ids(2, 1))
    assert names and not [name for name in names if "gci_kernels" in name]
    with Seen(names):
        patch(model, impl="auto")(input_ids=ids(2, 5), labels=ids(2, 5)).loss.backward()
    assert [name for name in names if "gci_kernels" in name]


class Seen(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the names of all operators."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ALONE)
def test_copies_and_pickles_keep_it(method):
    model = net(method, impl="reference")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert {layer.gci_impl for layer in adapted(other)} == {"reference"}
        assert "reference" in report(other)[0].plan
    assert {layer.gci_impl for layer in adapted(patch(model))} == {"auto"}  # the last call counts


@pytest.mark.parametrize("method", METHODS)
def test_unpatch_undoes_it(method):
    plain = unpatch(llama(method, impl="reference"))
    assert not [module for module in plain.modules() if "gci_impl" in vars(module)]


def test_unpatch_undoes_it_alone_where_patch_did_nothing_else():
    model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), LoRAMoEConfig(**MOE, target_modules=["0"]))
    patch(model, impl="aten")
    assert adapted(model)[0].gci_impl == "aten"
    assert unpatch(model) is model and adapted(model)[0].gci_impl == "auto"
    with pytest.raises(ValueError, match="nothing to unpatch"):
        unpatch(model)


def test_layers_that_come_later_have_it_too():
    model = llama("loramoe", impl="aten")
    model.add_adapter("other", LoRAMoEConfig(**MOE, target_modules=[*TARGETS, "up_proj"]))
    assert {layer.gci_impl for layer in adapted(model)} == {"aten"} and len(adapted(model)) == 6


@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_one_is_refused(method):
    with pytest.raises(ValueError) as refused:
        net(method, impl="fast") if method != "alora" else llama(method, impl="fast")
    assert "'fast'" in str(refused.value) and all(repr(impl) in str(refused.value) for impl in IMPLS)


@pytest.mark.parametrize("method", ALONE)
def test_one_that_cannot_run_raises_in_forward_and_is_reported(method):
    model = net(method, torch.float32, impl="triton")
    assert report(model)[0].plan.startswith("raises: impl='triton' cannot run here")
    for no_grad in (False, True):
        with torch.set_grad_enabled(not no_grad), pytest.raises(ValueError, match="impl='triton' cannot run here"):
            model(torch.zeros(2, 8))


def test_a_failing_patch_leaves_it_alone():
    plain = nn.Sequential(nn.Linear(8, 6))
    with pytest.raises(ValueError, match="target_modules"):
        patch(plain, LoraConfig(target_modules=["1"]), impl="reference")
    assert not [module for module in plain.modules() if "gci_impl" in vars(module)]


@pytest.mark.parametrize("method", [method for method in METHODS if not method.startswith("loki")])
def test_dropout_of_the_formula_is_the_kernels(method):
    """The same seeds, so that the same elements are dropped. LoKI has no dropout."""
    outputs = []
    for impl in ("auto", "reference"):
        model = llama(method, dropout=0.5, impl=impl).train()
        torch.manual_seed(4)
        outputs.append(model(input_ids=ids(2, 5), use_cache=False).logits)
    assert relative_error(*outputs) < 1e-5
