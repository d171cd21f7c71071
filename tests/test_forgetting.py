"""bench/forgetting: batches, losses, runs that are killed and go on, what is reported. A tiny Llama, no real texts."""

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import gci_kernels
from gci_kernels.bench.forgetting import evaluate, rates, report, runs, training
from gci_kernels.bench.forgetting.batches import Example, by_length, collate, plain, positions
from gci_kernels.bench.forgetting.evaluate import Point
from gci_kernels.bench.forgetting.gates import mean_gates, separation
from gci_kernels.bench.forgetting.methods import EAGER, METHODS, adapt
from gci_kernels.bench.forgetting.training import History, Schedule, train
from gci_kernels.loki import attribute_file

pytestmark = pytest.mark.usefixtures("one_thread")
VOCAB = 50


def llama(dtype=torch.float64):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def example(length, answer, task_type=0, seed=0):
    generator = torch.Generator().manual_seed(seed + 100 * length)
    ids = torch.randint(1, VOCAB, (length,), generator=generator).tolist()
    return Example(tuple(ids), (-100,) * (length - answer) + tuple(ids[length - answer :]), task_type)


EXAMPLES = [
    example(length, answer, length % 2) for length, answer in ((9, 3), (14, 5), (6, 1), (11, 4), (8, 2), (13, 6))
]


def one_by_one(model, examples):
    """Every answer's losses from a forward of its own, in the order of the examples."""
    losses = []
    for found in examples:
        logits = model(torch.tensor([found.ids])).logits[0, :-1].float()
        labels = torch.tensor(found.labels[1:])
        losses.append(F.cross_entropy(logits, labels, reduction="none", ignore_index=-100)[labels != -100])
    return losses


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


class Looks:
    """A domain loss that falls with the training, and a kill at a given look."""

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
    look = Looks(model.eval(), kill_at)
    start = look(0, 0)
    return train(model, EXAMPLES, schedule, start, look, kept, learning_rate=1e-2, pad=0, seed=seed, **options)


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


def test_a_run_is_looked_at_where_it_ends(tmp_path):
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
        assert training._balanced(model) == (name == "loramoe_balance")
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


POINTS = [
    Point(0, 0, 3.0, 2.0, 0.0, 0.0), Point(4, 100, 2.0, 2.1, 0.2, 0.1), Point(8, 200, 1.0, 2.5, 0.8, 0.5),
]  # fmt: skip


def test_matched_lies_between_two_looks():
    found = runs.matched(POINTS, 1.25)
    assert found == pytest.approx(
        {"step": 7, "tokens": 175, "domain_loss": 1.25, "general_loss": 2.4, "kl_texts": 0.65, "kl_own": 0.4}
    )
    assert runs.matched(POINTS, 1.0)["kl_texts"] == 0.8 and runs.matched(POINTS, 2.0)["kl_texts"] == 0.2
    assert runs.matched(POINTS, 0.9) is None and runs.matched(POINTS[:1], 1.0) is None


def reaching(lowest_that_does, asked):
    """Whether a rate gets there, where higher ones do; `asked` takes what was tried."""

    def reaches(rate):
        asked.append(rate)
        return rate >= lowest_that_does

    return reaches


@pytest.mark.parametrize(
    "limit, start, found, tried",
    [
        (2e-4, 2e-4, 2e-4, [2e-4, 1e-4]),
        (5e-5, 2e-4, 5e-5, [2e-4, 1e-4, 5e-5, 2e-5]),
        (4e-4, 1e-4, 5e-4, [1e-4, 2e-4, 5e-4]),
        (0.0, 2e-5, 1e-5, [2e-5, 1e-5]),
        (1.0, 2e-3, None, [2e-3, 5e-3]),
    ],
)
def test_the_lowest_rate_that_reaches_the_target(limit, start, found, tried):
    asked = []
    assert rates.lowest(reaching(limit, asked), start) == found and asked == tried


def test_every_method_begins_with_a_rate_of_the_grid():
    """The rule is one for all, and what is compared with a method's own ingredient has that method's rate."""
    assert all(method.learning_rate in rates.GRID for method in METHODS.values())
    assert METHODS["lora_rega"].learning_rate == METHODS["lora"].learning_rate
    assert (
        METHODS["loramoe_balance"].learning_rate
        == METHODS["loramoe"].learning_rate
        == EAGER["loramoe_eager"].learning_rate
    )


def result(method, seed, kl, reached=True):
    """A run as runs.py writes it."""
    points = [vars(point) for point in POINTS]
    return {
        "method": method, "title": (METHODS | EAGER)[method].title, "seed": seed, "learning_rate": 1e-3,
        "trainable": 1000, "points": points,
        "matched": {"step": 6, "tokens": 150.0, "kl_texts": kl, "kl_own": 2 * kl, "general_loss": 2 + kl}
        if reached else None,
        "answers": {name: 0.5 for name in report.ANSWERS}, "losses": [1.0] * 4, "tokens": [50, 60, 80, 90],
        "seconds": [9.0, 9.0, 0.5, 1.0], "memory": {"weights": 10, "optimizer": 20, "step": 30},
        "gates": [[0.3, 0.2], [0.2, 0.3]] if "loramoe" in method and method in METHODS else None, "mixture": None,
        "commit": {"sha": "0123456789abcdef", "changed": False},
    }  # fmt: skip


UNTOUCHED = {"points": [vars(POINTS[0])], "answers": {name: 0.25 for name in report.ANSWERS}}


def all_results():
    """REGA's claim holds in both seeds, LoRAMoE's over LoRA in one, LoKI over LoRA in none; full misses the target."""
    kl = {"lora_rega": (0.1, 0.1), "lora": (0.3, 0.4), "loramoe": (0.2, 0.5), "loki_10": (0.9, 0.9)}
    return [
        result(name, seed, kl.get(name, (0.6, 0.6))[seed], reached=name != "full")
        for name in METHODS
        for seed in (0, 1)
    ] + [result("loramoe_eager", 0, 0.2)]


def test_claims_need_every_seed():
    made = report.summary(UNTOUCHED, all_results())
    verdicts = {(c["lower"], c["higher"]): report.verdict(c["found"]["kl_texts"]) for c in made["claims"]}
    assert verdicts["lora_rega", "lora"] == "appears"
    assert verdicts["loramoe", "lora"] == "in 1 of 2 seeds"
    assert verdicts["loki_10", "lora"] == "reversed"
    assert verdicts["loramoe", "full"] == "not compared"
    assert len(made["claims"]) == len(report.CLAIMS)


def test_the_summary_means_over_seeds():
    row = report.summary(UNTOUCHED, all_results())["rows"]["lora"]
    assert row["kl_texts"]["mean"] == pytest.approx(0.35) and row["kl_texts"]["spread"] == pytest.approx(
        0.0707, abs=1e-4
    )
    assert row["general_loss"]["mean"] == pytest.approx(0.35) and row["reached"] == row["runs"] == 2
    assert row["tokens_per_second"]["mean"] == pytest.approx((80 / 0.5 + 90) / 2)
    assert row["memory"]["mean"] == 60


@pytest.fixture
def whole():
    return {
        "machine": {"cpu": "a CPU", "threads": 2}, 
        "versions": dict.fromkeys(("python", "gci_kernels", "torch", "transformers", "peft"), "1"),
        "settings": {"schedule": {"target": 1.0, "steps": 8}, "seeds": [0, 1]}, "untouched": UNTOUCHED,
        "summary": report.summary(UNTOUCHED, all_results()), "runs": all_results(),
        "trials": [result("lora", 100, 0.7, reached=False), result("lora", 100, 0.9)],
    }  # fmt: skip


def test_the_report_names_every_method_and_what_was_missed(whole):
    text = report.markdown(json.loads(json.dumps(whole)))
    table = text.split("## ")[0]
    assert all(f"| {method.title} |" in table for method in METHODS.values())
    assert f"| {METHODS['full'].title} | 0.0M | 0 of 2 | – | – | – | – |" in table
    assert "| +0.350 ±0.071 | 0.350 ±0.071 | 0.700 ±0.141 |" in table and "commit 0123456789" in text
    assert (
        EAGER["loramoe_eager"].title in text.split("## What training cost")[1]
        and EAGER["loramoe_eager"].title not in table
    )
    assert "| 0.2000 ±0.0000 |" in text.split("groups of experts")[1]
    assert all(claim[1] in text for claim in report.CLAIMS)
    assert "Kept trials, commit 0123456789:" in text
    assert text.split("## Learning rates")[1].splitlines()[6:8] == [
        "| LoRA r=32 | 0.001 | 1.000 | – | – | – |", "| LoRA r=32 | 0.001 | 1.000 | 6 | 0.900 | 1.800 |",
    ]  # fmt: skip


def test_a_report_without_trials_says_nothing_of_them(whole):
    assert "Learning rates" not in report.markdown(whole | {"trials": []})


def test_the_picture_is_drawn(whole, tmp_path):
    pytest.importorskip("matplotlib")
    from gci_kernels.bench.forgetting.plot import draw

    draw(whole, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 20_000


def test_a_history_survives_its_file(tmp_path):
    model = lora()
    history = run(model, tmp_path / "kept", steps=4)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    again = training._resume(tmp_path / "kept", parameters, torch.optim.AdamW(parameters.values()))
    assert isinstance(again, History) and vars(again) == vars(history)
    assert training._resume(tmp_path / "none", parameters, torch.optim.AdamW(parameters.values())) is None
