"""Whole runs of transformers' Trainer: each method learns what the same layers learn without the package."""

import json
import re

import datasets
import pytest
import torch
import toy_training as toy
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback

import gci_kernels
from gci_kernels.bench.baselines import to_eager
from gci_kernels.tuners.methods import type_in_file

pytestmark = pytest.mark.usefixtures("one_thread")

# The model's loss is a float32 number; all that leads to it is float64.
TIGHT = dict(rel=1e-5)


@pytest.mark.parametrize("method", toy.METHODS)
def test_losses_are_those_of_the_eager_layers(method, tmp_path):
    ours = toy.train(toy.fused(method), tmp_path)
    assert ours == pytest.approx(toy.train(toy.eager(method), tmp_path), **TIGHT)
    assert len(ours) == 4 and ours[-1] != pytest.approx(ours[0], rel=1e-2), "a step shows"


def test_unpatched_lora_goes_on_as_before(tmp_path):
    model = toy.fused("lora")
    adapted = [layer for layer in model.modules() if hasattr(layer, "lora_A")]
    assert adapted and all(isinstance(layer, gci_kernels.tuners.FusedLoraLinear) for layer in adapted)
    first = toy.train(model, tmp_path, max_steps=2)
    for name, module in model.named_modules():
        if isinstance(module, gci_kernels.tuners.FusedLoraLinear):
            assert "default" in module.lora_A, name
    peft_model = toy.eager("lora")
    gci_kernels.patch(peft_model)
    assert toy.train(peft_model, tmp_path, max_steps=2) == first
    second = toy.train(model, tmp_path, max_steps=2)
    assert toy.train(gci_kernels.unpatch(peft_model), tmp_path, max_steps=2) == pytest.approx(second, **TIGHT)


@pytest.mark.parametrize("method", toy.METHODS)
def test_accumulated_gradients_are_those_of_the_large_batch(method, tmp_path):
    small = toy.train(toy.fused(method), tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    large = toy.train(toy.fused(method), tmp_path, per_device_train_batch_size=4)
    assert len(small) == 2 * len(large) == 8
    assert [a + b for a, b in zip(small[::2], small[1::2], strict=True)] == pytest.approx(large, **TIGHT)


@pytest.mark.parametrize("use_reentrant", (True, False))
@pytest.mark.parametrize("method", toy.METHODS)
def test_gradient_checkpointing_changes_nothing(method, use_reentrant, tmp_path):
    expected = toy.train(toy.fused(method, 0.2), tmp_path)
    model = toy.fused(method, 0.2)
    model.enable_input_require_grads()
    arguments = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert toy.train(model, tmp_path, **arguments) == pytest.approx(expected, **TIGHT)
    if method != "loki":
        assert toy.train(toy.fused(method), tmp_path) != pytest.approx(expected, rel=1e-3), "dropout shows"


@pytest.mark.parametrize("method", toy.METHODS)
def test_autocast_is_as_near_to_the_truth_as_the_eager_layers_are(method, tmp_path):
    truth = torch.tensor(toy.train(toy.fused(method), tmp_path, learning_rate=2e-3))
    errors = []
    for model in (toy.fused(method), toy.eager(method)):
        found = toy.train(model.float(), tmp_path, learning_rate=2e-3, bf16=True)
        errors.append((torch.tensor(found) - truth).abs().max().item())
    assert 0 < errors[0] <= 2 * errors[1] + 2e-3, errors


@pytest.mark.parametrize("method", toy.METHODS)
def test_resumed_run_is_the_uninterrupted_one(method, tmp_path):
    whole = toy.train(toy.fused(method, 0.2), tmp_path / "a", max_steps=6, save_strategy="steps", save_steps=3)
    run = toy.trainer(toy.fused(method, 0.2), tmp_path / "b", max_steps=6)
    run.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert run.losses == whole[3:]


@pytest.mark.smoke
@pytest.mark.parametrize("method", toy.METHODS)
def test_saved_is_the_adapter_alone(method, tmp_path):
    run = toy.trainer(toy.fused(method), tmp_path, max_steps=2)
    run.train()
    run.save_model()
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert weights and all(re.search(r"\.(lora|loramoe|gci_alora|gci_hydralora|loki)_", key) for key in weights)
    assert not any("base_layer" in name for name in weights) and not (tmp_path / "model.safetensors").exists()
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == ("LORA" if method == "lora" else type_in_file(type(toy.CONFIGS[method](0.0))))
    loaded = PeftModel.from_pretrained(toy.plain(), tmp_path, autocast_adapter_dtype=False).double()
    if method == "lora":
        gci_kernels.patch(loaded)
    batch = toy.collate(toy.samples()[:2])
    with torch.no_grad():
        expected = run.model.eval()(**batch).logits
        torch.testing.assert_close(loaded.eval()(**batch).logits, expected, rtol=1e-9, atol=1e-9)


class Generating(TrainerCallback):
    """Generates after every evaluation, as people do who look at samples while they train."""

    def __init__(self) -> None:
        self.texts: list[list[int]] = []

    def on_evaluate(self, args, state, control, model, **kwargs) -> None:
        model.eval()
        ids = torch.tensor([[5, 6, 7], [9, 8, 40]])
        self.texts.append(model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0).flatten().tolist())
        model.train()


@pytest.mark.parametrize("method", toy.METHODS)
def test_evaluating_and_generating_meanwhile_changes_nothing(method, tmp_path):
    found = []
    for model in (toy.fused(method), toy.eager(method)):
        sees = Generating()
        run = toy.trainer(model, tmp_path, eval_strategy="steps", eval_steps=1, callbacks=[sees])
        run.train()
        evaluations = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
        found.append((run.losses, evaluations, sees.texts))
    ours, theirs = found
    assert ours[0] == toy.train(toy.fused(method), tmp_path)
    assert len(ours[1]) == 4 and ours[1] == pytest.approx(theirs[1], **TIGHT)
    assert ours[2] == theirs[2] and len(set(map(str, ours[2]))) > 1, "what is generated follows the training"


@pytest.mark.parametrize("method", toy.METHODS)
def test_output_may_be_written_into_as_a_linear_layers_may(method):
    batch, found = toy.collate(toy.samples()[:2]), []
    for in_place in (True, False):
        model = toy.fused(method).train()
        for name, module in model.named_modules():
            if name.endswith(tuple(toy.TARGETS)):  # the adapted layers
                module.register_forward_hook(lambda m, x, y, i=in_place: y.clamp_(-1, 1) if i else y.clamp(-1, 1))
        model(**batch).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert found[0].norm() > 0 and torch.equal(*found)


def balanced(**changes):
    return toy.fused("loramoe", balance_weight=0.5, balance_delta=0.3, **changes)


def test_balance_loss_joins_where_task_types_reach_the_model(tmp_path):
    data = datasets.Dataset.from_list(toy.samples(tasks=True))
    without = toy.train(balanced(), tmp_path, toy.samples())
    # Trainer drops columns that the model's forward does not name.
    assert toy.train(balanced(), tmp_path, data) == without
    arguments = dict(remove_unused_columns=False, train_sampling_strategy="sequential")
    kept = toy.train(balanced(), tmp_path, data, **arguments)
    without = toy.train(balanced(), tmp_path, toy.samples(), **arguments)
    assert kept[0] - without[0] > 1e-2 and kept[3] - without[3] > 1e-2
    # The whole run against a loop that adds the constraint itself.
    run, model = toy.trainer(balanced(), tmp_path, data, **arguments), balanced().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2, weight_decay=0.0)
    for batch, expected in zip(run.get_train_dataloader(), kept, strict=True):
        optimizer.zero_grad()
        labels, output = batch.pop("labels"), model(**batch)
        loss = output["balance_loss"] + model.loss_function(output.logits, labels, 64)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert loss.item() == pytest.approx(expected, **TIGHT)


def test_balance_loss_of_accumulated_batches_is_their_mean_over_tokens(tmp_path):
    pair = toy.samples(tasks=True)[1:3]  # one of each task, 3 and 11 targets
    arguments = dict(remove_unused_columns=False, train_sampling_strategy="sequential")
    once = toy.train(balanced(), tmp_path, pair * 4, **arguments)
    twice = toy.train(balanced(), tmp_path, pair * 8, gradient_accumulation_steps=2, **arguments)
    assert [a + b for a, b in zip(twice[::2], twice[1::2], strict=True)] == pytest.approx(once, **TIGHT)
    # Batches of one: each one's constraint counts as its targets do.
    model, batches = balanced().train(), [toy.collate([sample]) for sample in pair]
    first = toy.train(balanced(), tmp_path, pair, per_device_train_batch_size=1, gradient_accumulation_steps=2,
                      max_steps=1, **arguments)  # fmt: skip
    for batch, found, share in zip(batches, first, (3 / 14, 11 / 14), strict=True):
        assert found == pytest.approx(share * model(**batch).loss.item(), **TIGHT)


def test_eager_copy_is_not_the_fused_model():
    """What the comparisons above rest on."""
    for method in toy.METHODS[1:]:
        names = {type(module).__name__ for module in to_eager(toy.fused(method)).modules()}
        assert any(name.startswith("Eager") for name in names)
        assert not names & {"LoRAMoELinear", "ALoRALinear", "LoKILinear"}
