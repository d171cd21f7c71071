"""One model in several threads: mixed batches at once, and the replicas of torch.nn.DataParallel."""

import functools
import sys
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_mixed_batches import BATCH, NAMES, with_two
from toy_decoding import IDS, METHODS, TARGETS, adapted, config, settings, tiny_llama

from gci_kernels import LoKIConfig, patch, unpatch
from gci_kernels.accuracy import relative_error

pytestmark = pytest.mark.usefixtures("poisoned")

LONG = IDS.repeat(2, 4)  # too many tokens for a decoding step


def at_once(*calls):
    """What the calls return, each in a thread of its own."""
    results = [None] * len(calls)

    def work(number):
        try:
            results[number] = calls[number]()
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def meeting(model, count):
    """All threads meet before the last layer, when each has begun and none has ended."""
    barrier = threading.Barrier(count, timeout=30)

    def wait(module, args):
        barrier.wait()

    return model.get_base_model().model.layers[1].register_forward_pre_hook(wait)


def lora_of_all_kinds():
    """With an embedding, a head that is saved whole, and a layer that PEFT runs itself."""
    torch.manual_seed(0)
    made = dict(r=4, target_modules=["embed_tokens", *TARGETS], init_lora_weights=False)
    model = get_peft_model(tiny_llama(), LoraConfig(modules_to_save=["lm_head"], **made))
    model.add_adapter("other", LoraConfig(modules_to_save=["lm_head"], **made))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name or "lora_embedding" in name:
            parameter.data.normal_()
    return patch(model).eval()


KINDS = (*METHODS, "loki", "lora of all kinds")


@pytest.mark.parametrize("ids", (BATCH[:, :1], BATCH, BATCH.repeat(1, 4)), ids=("step", "prompt", "long"))
@pytest.mark.parametrize("method", KINDS)
def test_each_thread_keeps_its_own_names(method, ids):
    model = lora_of_all_kinds() if method == "lora of all kinds" else with_two(method)
    lists = [NAMES, NAMES[::-1], ["default"] * 4, None]
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]

    @torch.no_grad()
    def run(names):
        return (model(ids) if names is None else model(ids, adapter_names=names)).logits

    wanted = [run(names) for names in lists]
    assert all(relative_error(a, wanted[0]) > 1e-3 for a in wanted[1:])
    handle = meeting(model, len(lists))
    for _ in range(3):
        found = at_once(*(lambda names=names: run(names) for names in lists))
        assert all(torch.equal(a, w) for a, w in zip(found, wanted, strict=True))
    handle.remove()
    assert hooks == [len(module._forward_pre_hooks) for module in model.modules()]


@pytest.mark.parametrize("method", (*METHODS, "loki"))
def test_generation_in_threads(method):
    model = with_two(method)
    asked = [dict(adapter_names=NAMES, num_beams=2), dict(adapter_names=NAMES[::-1]), {}]

    def run(more):
        return model.generate(**settings(BATCH, **more))

    wanted = [run(more) for more in asked]
    found = at_once(*(lambda more=more: run(more) for more in asked))
    assert all(torch.equal(a, w) for a, w in zip(found, wanted, strict=True))


def test_wrong_names_in_one_thread_leave_the_other_alone():
    model = with_two("lora")
    wanted = model(BATCH, adapter_names=NAMES).logits

    def fail():
        for names in (["default"] * 3, ["nobody"] * 4):
            with pytest.raises(ValueError, match="Length of `adapter_names`|non-existing adapter"):
                model(BATCH, adapter_names=names)
        with pytest.raises(ValueError, match="training mode"):
            with_two("lora").train()(BATCH, adapter_names=NAMES)

    _, actual = at_once(fail, lambda: model(BATCH, adapter_names=NAMES).logits)
    assert torch.equal(actual, wanted)


def test_the_tuner_of_peft_is_given_back():
    model = get_peft_model(tiny_llama(), config("lora"))
    kind = type(model.base_model)
    patch(model)
    assert type(model.base_model) is not kind and isinstance(model.base_model, kind)
    unpatch(model)
    assert type(model.base_model) is kind


@pytest.fixture
def replicate(monkeypatch):
    """torch.nn.DataParallel's replicas, both on the CPU."""
    module = sys.modules["torch.nn.parallel.replicate"]  # torch.nn.parallel.replicate is the function

    def copies(tensors, devices, detach=False):
        return [[(t.detach() if detach else t).clone() for t in tensors] for _ in devices]

    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copies)
    monkeypatch.setattr(module, "_get_device_index", lambda device, *_: device)
    return lambda model: module.replicate(model, [0, 1], detach=not torch.is_grad_enabled())


def with_adapter(method):
    if method == "loki*":
        return patch(tiny_llama(), LoKIConfig(positions=[[3, 9, 40], [7]], r=2, init_weights=False)).eval()
    if method == "lora with a bias":
        for_bias = tiny_llama()
        for module in for_bias.modules():
            if isinstance(module, torch.nn.Linear):
                module.bias = torch.nn.Parameter(torch.randn(module.out_features))
        model = patch(for_bias, config("lora", lora_bias=True))
        for name, parameter in model.named_parameters():
            if "lora_B" in name and "bias" in name:
                parameter.data.normal_()
        return model.eval()
    return adapted(method)


REPLICATED = (*METHODS, "loki", "loki*", "lora with a bias")


@pytest.mark.parametrize("method", REPLICATED)
@pytest.mark.parametrize("ids", (torch.cat((IDS, IDS + 1)), LONG), ids=("step", "long"))
def test_replicas_in_evaluation(method, ids, replicate):
    model = with_adapter(method)
    with torch.no_grad():
        wanted = model(ids).logits
        replicas = replicate(model)

        def run(number):
            with torch.no_grad():
                return replicas[number](ids[2 * number : 2 * number + 2]).logits

        found = torch.cat(at_once(lambda: run(0), lambda: run(1)))
    assert relative_error(found, wanted) < 1e-5


@pytest.mark.parametrize("method", REPLICATED)
def test_replicas_in_training(method, replicate):
    model = with_adapter(method).train()

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def loss(model, half):
        return model(**half).loss

    halves = [dict(input_ids=LONG[half], labels=LONG[half]) for half in (slice(0, 2), slice(2, 4))]
    wanted = gradients(sum(loss(model, half) for half in halves))
    for _ in range(2):  # LoKI keeps a copy of W from the first
        replicas = replicate(model)
        losses = at_once(*(functools.partial(loss, replicas[n], halves[n]) for n in range(2)))
        actual = gradients(sum(losses))
        assert wanted.keys() == actual.keys() and all(relative_error(actual[n], wanted[n]) < 1e-5 for n in wanted)
