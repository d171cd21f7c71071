"""The forgetting benchmark's batches, losses and gates, with a tiny Llama and no real texts."""

import pytest
import torch
from toy_forgetting import EXAMPLES, POINTS, example, llama, one_by_one

import gci_kernels
from gci_kernels.bench.forgetting import evaluate, runs
from gci_kernels.bench.forgetting.batches import Example, by_length, collate, plain, positions
from gci_kernels.bench.forgetting.gates import mean_gates, separation

pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def test_a_batch_has_the_losses_of_its_examples_alone():
    model, batch = llama(), collate(EXAMPLES, 0)
    losses = batch.losses(batch.logits(model)[0])
    torch.testing.assert_close(losses, torch.cat(one_by_one(model, EXAMPLES)), rtol=0, atol=1e-5)
    assert batch.tokens == sum(len(e.ids) for e in EXAMPLES) and batch.targets.shape[1] == 6
    assert batch.task_types.tolist() == [e.task_type for e in EXAMPLES]


@torch.no_grad()
def test_answers_reach_the_head_as_a_tensor_of_their_own():
    """PyTorch copies a frozen head for every row where what it multiplies is a slice."""
    model, shapes = llama().requires_grad_(False), []
    model.lm_head.register_forward_pre_hook(lambda head, args: shapes.append((args[0].is_contiguous(), args[0].shape)))
    batch = collate(EXAMPLES, 0)
    batch.logits(model)
    model.generate(batch.input_ids, max_new_tokens=2, logits_to_keep=positions(-1, 0))
    assert shapes == [(True, (6, 6, 32)), (True, (6, 1, 32)), (True, (6, 1, 32))]


@torch.no_grad()
def test_of_a_plain_text_all_but_the_first_token_counts():
    model, texts = llama(), [plain(example(length, 1).ids) for length in (5, 9)]
    batch = collate(texts, 0)
    losses = batch.losses(batch.logits(model)[0])
    assert len(losses) == 4 + 8
    torch.testing.assert_close(losses, torch.cat(one_by_one(model, texts)), rtol=0, atol=1e-5)


def test_an_answer_may_have_gaps():
    """Of a conversation with two answers all between them is kept, and the turn between them not counted."""
    found = Example((1, 2, 3, 4, 5, 6), (-100, 2, -100, -100, 5, 6))
    batch = collate([found], 0)
    assert found.answer == 5 and batch.targets.tolist() == [[2, -100, -100, 5, 6]]


def test_batches_of_like_lengths():
    rows = by_length(EXAMPLES, 4)
    assert rows == [[2, 4, 0, 3], [5, 1]]


@pytest.mark.smoke
@torch.no_grad()
def test_kl_is_what_its_formula_says():
    generator = torch.Generator().manual_seed(1)
    old, new = (torch.randn(300, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    p, q = old.softmax(-1), new.softmax(-1)
    torch.testing.assert_close(evaluate._kl(old, new).double(), (p * (p / q).log()).sum(-1), rtol=1e-5, atol=1e-6)
    assert evaluate._kl(old, old).abs().max() < 1e-6


@torch.no_grad()
def test_mean_gates_are_those_of_each_token():
    model = gci_kernels.patch(llama(), gci_kernels.LoRAMoEConfig(r=2, num_experts=4)).double().eval()
    layers = [module for module in model.modules() if type(module).__name__ == "LoRAMoELinear"]
    seen = {layer: [] for layer in layers}
    handles = [layer.register_forward_pre_hook(lambda layer, args: seen[layer].append(args[0])) for layer in layers]
    expected = [[], []]
    for found in EXAMPLES:
        model(torch.tensor([found.ids]))
        for layer in layers:
            x = seen[layer].pop()[0]
            expected[found.task_type] += (x @ layer.loramoe_router["default"].T).softmax(-1)
    for handle in handles:
        handle.remove()
    means = torch.stack([torch.stack(rows).mean(0) for rows in expected])
    gates = mean_gates(model, [collate(EXAMPLES[:2], 0), collate(EXAMPLES[2:], 0)])
    torch.testing.assert_close(torch.tensor(gates, dtype=torch.float64), means, rtol=1e-5, atol=1e-6)
    assert not any(layer._forward_pre_hooks for layer in layers)


def test_separation_of_the_experts_halves():
    assert separation([[0.25] * 4, [0.25] * 4]) == 0
    assert separation([[0.1, 0.2, 0.3, 0.4], [0.3, 0.3, 0.2, 0.2]]) == pytest.approx(0.3)


def test_matched_lies_between_two_evaluations():
    found = runs.matched(POINTS, 1.25)
    assert found == pytest.approx(
        {"step": 7, "tokens": 175, "domain_loss": 1.25, "general_loss": 2.4, "kl_texts": 0.65, "kl_own": 0.4}
    )
    assert runs.matched(POINTS, 1.0)["kl_texts"] == 0.8 and runs.matched(POINTS, 2.0)["kl_texts"] == 0.2
    assert runs.matched(POINTS, 0.9) is None and runs.matched(POINTS[:1], 1.0) is None
