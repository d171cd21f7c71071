"""LoRAMoE's balance loss in models: where it joins the loss, and where it is refused."""

import pytest
import torch
from toy_loramoe import (
    IDS,
    LABELS,
    MASK,
    TASKS,
    TRAINING_BATCH,
    WEIGHT,
    adapted,
    adapter_gradients,
    assert_same_gradients,
    balanced_config,
    restated,
    restated_balance,
    tiny_llama,
)

from gci_kernels.accuracy import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("include_padding", [False, True])
@pytest.mark.parametrize("top_k", [None, 3])
def test_balance_loss_joins_the_loss(task_type, include_padding, top_k):
    config = balanced_config(balance_include_padding=include_padding, task_type=task_type, top_k=top_k)
    model = adapted(config)
    output = model(**TRAINING_BATCH)

    expected = restated(tiny_llama(), model)
    plain_loss = expected(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss
    balance = restated_balance(expected, include_padding=include_padding)
    assert relative_error(output.balance_loss, balance) < 1e-10
    assert relative_error(output.loss, plain_loss + balance) < 1e-6  # transformers computes its loss in float32

    output.loss.backward()
    (plain_loss + balance).backward()
    assert_same_gradients(model, expected)


def test_balance_loss_reaches_the_routers():
    model = adapted(balanced_config())
    with_balance, without = (model(**{**TRAINING_BATCH, "task_types": tasks}) for tasks in (TASKS, None))
    difference = with_balance.loss - without.loss
    difference.backward()
    routers = {name: grad for name, grad in adapter_gradients(model).items() if "router" in name}
    assert len(routers) == 6
    assert all(gradient.abs().max() > 1e-6 for gradient in routers.values())


def test_balance_loss_sums_over_active_adapters():
    model = adapted(balanced_config())
    model.add_adapter("other", balanced_config(num_experts=2, r=1, target_modules=["q_proj", "up_proj"]))
    model.base_model.set_adapter(["default", "other"])
    expected = restated(tiny_llama(), model, ["default", "other"])
    expected(input_ids=IDS, attention_mask=MASK)
    assert relative_error(model(**TRAINING_BATCH).balance_loss, restated_balance(expected)) < 1e-10


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("weight", [WEIGHT, 0.0])
@pytest.mark.parametrize("task_types", [TASKS, None], ids=["task_types", "none"])
def test_balance_loss_is_added_only_in_training_with_weight_and_task_types(training, weight, task_types):
    model = adapted(balanced_config(balance_weight=weight)).train(training)
    plain = {name: value for name, value in TRAINING_BATCH.items() if name != "task_types"}
    wanted = model(**plain).loss
    output = model(**plain, task_types=task_types)
    added = training and weight > 0 and task_types is not None
    assert ("balance_loss" in output) == added
    assert torch.equal(output.loss, wanted) != added


def test_balance_loss_without_labels_is_given_beside_the_logits():
    model = adapted(balanced_config())
    output = model(input_ids=IDS, attention_mask=MASK, task_types=TASKS)
    assert torch.equal(output.balance_loss, model(**TRAINING_BATCH).balance_loss)
    assert output.loss is None


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_balance_loss_with_tuples(task_type):
    model = adapted(balanced_config(task_type=task_type))
    output = model(**TRAINING_BATCH)
    loss, tuple_logits, *_ = model(**TRAINING_BATCH, return_dict=False)
    assert torch.equal(loss, output.loss)
    assert torch.equal(tuple_logits, output.logits)


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_balance_loss_with_tuples_needs_labels(task_type):
    model = adapted(balanced_config(task_type=task_type))
    with pytest.raises(TypeError, match="task_types"):
        model(input_ids=IDS, attention_mask=MASK, task_types=TASKS, return_dict=False)


def test_balance_loss_without_gradients():
    model = adapted(balanced_config())
    with torch.no_grad():
        loss = model(**TRAINING_BATCH).loss
    assert torch.equal(loss, model(**TRAINING_BATCH).loss)


def test_balance_loss_takes_tasks_as_a_list_and_the_mask_by_position():
    model = adapted(balanced_config())
    output = model.get_base_model()(IDS, MASK, labels=LABELS, task_types=TASKS.tolist())
    assert torch.equal(output.loss, model(**TRAINING_BATCH).loss)


def test_balance_loss_under_gradient_checkpointing():
    plain, checkpointed = adapted(balanced_config()), adapted(balanced_config())
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls = []
    layer = checkpointed.get_base_model().model.layers[0].mlp
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    outputs = [each(**TRAINING_BATCH) for each in (plain, checkpointed)]
    for output in outputs:
        output.loss.backward()
    assert len(calls) == 2, "nothing was checkpointed"
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    assert torch.equal(outputs[0].balance_loss, outputs[1].balance_loss)
    assert_same_gradients(checkpointed, plain, tolerance=1e-14)


def test_balance_loss_refuses_reentrant_checkpointing():
    model = adapted(balanced_config())
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(RuntimeError, match="use_reentrant.*False"):
        model(**TRAINING_BATCH)
    plain = {name: value for name, value in TRAINING_BATCH.items() if name != "task_types"}
    model(**plain).loss.backward()  # without the constraint there is nothing against it
    assert all(gradient.any() for gradient in adapter_gradients(model).values())


def test_pass_ends_where_the_forward_raises():
    model = adapted(balanced_config())

    def stop(module, args):
        raise KeyError("stop")

    handle = model.get_base_model().lm_head.register_forward_pre_hook(stop)
    with pytest.raises(KeyError, match="stop"):
        model(**TRAINING_BATCH)
    handle.remove()
    assert not model.base_model.collector.active
    fresh = adapted(balanced_config())
    assert torch.equal(model(**TRAINING_BATCH).balance_loss, fresh(**TRAINING_BATCH).balance_loss)


@pytest.mark.parametrize(
    ("task_types", "error"),
    [(torch.tensor([1, 0]), ValueError), (torch.tensor([[1, 0, 0]]), ValueError), (torch.ones(3), TypeError)],
    ids=["length", "rank", "float"],
)
def test_bad_task_types_are_named(task_types, error):
    model = adapted(balanced_config())
    with pytest.raises(error, match="^task_types must be"):
        model(**{**TRAINING_BATCH, "task_types": task_types})
    assert "balance_loss" in model(**TRAINING_BATCH)
