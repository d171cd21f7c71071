"""The forgetting benchmark's training: runs that are killed and resume, every method, the order of the examples."""

import pytest
import torch
from toy_forgetting import EXAMPLES, example, llama, one_by_one

from gci_kernels.bench.forgetting import training
from gci_kernels.bench.forgetting.batches import collate
from gci_kernels.bench.forgetting.evaluate import Point
from gci_kernels.bench.forgetting.methods import EAGER, METHODS, adapt
from gci_kernels.bench.forgetting.training import History, Schedule, train
from gci_kernels.loki import attribute_file

pytestmark = pytest.mark.usefixtures("one_thread")


class Evaluations:
    """A domain loss that falls with the training, and a kill at a given evaluation."""

    def __init__(self, model, kill_at=None):
        self.model, self.kill_at, self.batch = model, kill_at, collate(EXAMPLES, 0)

    @torch.no_grad()
    def __call__(self, step, tokens):
        assert not self.model.training
        if step == self.kill_at:
            raise KeyboardInterrupt
        loss = self.batch.losses(self.batch.logits(self.model)[0]).mean().item()
        return Point(step, tokens, loss, loss + 1, step / 10, step / 20)


def run(model, kept, *, kill_at=None, target=0.0, steps=8, seed=0, **options):
    schedule = Schedule(batch=4, every=2, steps=steps, target=target)
    evaluate = Evaluations(model.eval(), kill_at)
    start = evaluate(0, 0)
    return train(model, EXAMPLES, schedule, start, evaluate, kept, learning_rate=1e-2, pad=0, seed=seed, **options)


def lora(seed=0):
    return adapt(llama(), METHODS["lora"], None, seed)


def test_a_run_ends_at_its_target_or_with_its_steps(tmp_path):
    whole = run(lora(), tmp_path / "a.partial")
    losses = [point.domain_loss for point in whole.points]
    assert [point.step for point in whole.points] == [0, 2, 4, 6, 8] and losses == sorted(losses, reverse=True)
    target = (losses[2] + losses[1]) / 2
    early = run(lora(), tmp_path / "b.partial", target=target)
    assert [point.step for point in early.points] == [0, 2, 4] and early.losses == whole.losses[:4]
    assert whole.points[-1].tokens == sum(whole.tokens) and len(whole.seconds) == 8 and whole.memory >= 0


def test_a_run_is_evaluated_where_it_ends(tmp_path):
    assert [point.step for point in run(lora(), tmp_path / "kept", steps=5).points] == [0, 2, 4, 5]


def test_memory_is_that_of_the_second_step(tmp_path, monkeypatch):
    """By then the optimizer's moments are there, and are counted by themselves."""
    monkeypatch.setattr(training, "peak_memory", lambda step, device: step() or step.args[-1].done)
    history = run(lora(), tmp_path / "kept", steps=4)
    assert history.memory == 2 and history.done == 4


def test_training_is_adamw_with_warm_up_and_clipped_gradients(tmp_path):
    """Against a plain loop over the same batches, each example by itself."""
    trained, plain = lora(), lora()
    run(trained, tmp_path / "kept", steps=6)
    parameters = [p for p in plain.parameters() if p.requires_grad]
    optimizer, norms = torch.optim.AdamW(parameters, weight_decay=0.0), []
    for step, rows in enumerate(training.batches_of(EXAMPLES, 4, 6, 0)):
        loss = torch.cat(one_by_one(plain, [EXAMPLES[row] for row in rows])).mean()
        gradients = torch.autograd.grad(loss, parameters)
        norms.append(torch.cat([g.flatten() for g in gradients]).norm())
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient / norms[-1].clamp(min=1)
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1, (step + 1) / 4)
        optimizer.step()
    assert max(norms) > 2 * min(norms) > 2  # Adam would not show a clipping that is the same in every step
    for mine, other in zip((p for p in trained.parameters() if p.requires_grad), parameters, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kill_at", [2, 4, 8])
def test_a_killed_run_goes_on_to_the_bit(tmp_path, kill_at):
    whole = run(lora(), tmp_path / "whole.partial")
    kept = tmp_path / "killed.partial"
    with pytest.raises(KeyboardInterrupt):
        run(lora(), kept, kill_at=kill_at)
    went_on = run(lora(), kept)
    assert went_on.points == whole.points and went_on.losses == whole.losses and went_on.tokens == whole.tokens


def test_another_seed_sees_the_examples_in_another_order(tmp_path):
    assert run(lora(), tmp_path / "0", steps=2).losses != run(lora(), tmp_path / "1", steps=2, seed=1).losses


def test_batches_take_every_example_once_a_pass_and_like_lengths_together():
    many = [example(6 + index * 7 % 40, 2, seed=index) for index in range(32)]
    batches = training.batches_of(many, 4, 20, 0)
    assert len(batches) == 20 and all(len(batch) == 4 for batch in batches)
    for first in (0, 8):
        assert sorted(sum(batches[first : first + 8], [])) == list(range(32))
    assert batches[:8] != batches[8:16] and batches != training.batches_of(many, 4, 20, 1)
    lengths = [[len(many[index].ids) for index in batch] for batch in batches]
    assert sum(4 * max(batch) - sum(batch) for batch in lengths) < 0.2 * sum(map(sum, lengths))
    # The first of each four batches is not always the one of the shortest.
    assert len({min(range(4), key=lambda place: lengths[4 * window + place]) for window in range(5)}) > 1


def test_fewer_examples_than_a_batch_are_repeated():
    assert sorted(sum(training.batches_of(EXAMPLES[:2], 4, 3, 0), [])) == [0] * 6 + [1] * 6


def test_adapters_start_as_their_seed_says():
    def A(seed):
        return next(p for name, p in lora(seed).named_parameters() if "lora_A" in name)

    assert torch.equal(A(1), A(1)) and not torch.equal(A(1), A(2))


def test_the_balance_constraint_is_trained(tmp_path):
    """It needs the task types, moves the routers, and is not part of the loss that is written down."""
    losses = {}
    for name in ("loramoe", "loramoe_balance"):
        model = adapt(llama(), METHODS[name], None, 0)
        assert training._has_balance_constraint(model) == (name == "loramoe_balance")
        history = run(model, tmp_path / name, steps=2)
        losses[name] = history.losses
    assert losses["loramoe"][0] == losses["loramoe_balance"][0]
    assert losses["loramoe"][1] != losses["loramoe_balance"][1]


@pytest.fixture
def scores(tmp_path):
    path = tmp_path / "scores.safetensors"
    attribute_file(llama(torch.float32), [list(range(1, 9)), list(range(5, 17))], path, progress=False)
    return path


@pytest.mark.parametrize("name", [*METHODS, *EAGER])
def test_every_method_learns(tmp_path, scores, name):
    model = adapt(llama(torch.float32), (METHODS | EAGER)[name], scores, 0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(before[n].dtype == torch.float32 for n in trained)
    history = run(model, tmp_path / "kept", steps=4)
    assert history.points[-1].domain_loss < history.points[0].domain_loss - 0.05
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and changed <= trained


@pytest.mark.parametrize("name, rows, rank", [("loki_10", 3, None), ("loki_30", 9, None), ("loki_star", 9, 32)])
def test_loki_trains_its_share_of_the_rows(scores, name, rows, rank):
    config = METHODS[name].config(scores)
    assert [len(chosen) for chosen in config.positions] == [rows, rows] and config.r == rank
    assert rank is None or config.lora_alpha == 2 * rank


def test_fused_and_eager_loramoe_train_alike(tmp_path):
    methods = METHODS["loramoe"], EAGER["loramoe_eager"]
    losses = [run(adapt(llama(), method, None, 0), tmp_path / method.title).losses for method in methods]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=1e-5)


def test_a_history_survives_its_file(tmp_path):
    model = lora()
    history = run(model, tmp_path / "kept", steps=4)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    again = training._resume(tmp_path / "kept", parameters, torch.optim.AdamW(parameters.values()))
    assert isinstance(again, History) and vars(again) == vars(history)
    assert training._resume(tmp_path / "none", parameters, torch.optim.AdamW(parameters.values())) is None
