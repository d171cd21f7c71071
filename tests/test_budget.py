"""What keeps a benchmark within its time: shares of it, sizes and rounds that fit, dtypes that are worth it."""

import math

import pytest
import torch

from gci_kernels.bench import budget, correctness, products, timing
from gci_kernels.bench.products import Rates

CPU = torch.device("cpu")


class Clock:
    """A clock that goes only as far as it is told to."""

    def __init__(self, monkeypatch) -> None:
        self.now = 100.0
        for name in ("monotonic", "perf_counter"):
            monkeypatch.setattr(f"time.{name}", lambda: self.now)

    def work(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def test_a_step_that_ends_early_leaves_its_time_to_the_others_and_a_late_one_takes_from_them(clock) -> None:
    run = budget.Budget(60.0, [1, 2, 3])
    run.begin_step()
    assert run.step_left() == pytest.approx(10)
    clock.work(2)
    run.begin_step()
    assert run.step_left() == pytest.approx(58 * 2 / 5)
    clock.work(50)
    assert run.step_left() < 0
    run.begin_step()
    assert run.step_left() == pytest.approx(8)
    clock.work(20)
    assert run.left() == pytest.approx(-12)


def test_what_is_left_for_a_step_that_begins_late_is_nothing(clock) -> None:
    run = budget.Budget(1.0, [1, 1])
    clock.work(5)
    run.begin_step()
    assert run.step_left() == 0


@pytest.mark.parametrize(
    ("per_token", "chosen", "ran"),
    [
        (0.1, 256, [16]),  # a fast machine: the smallest foretells the largest
        (0.23, 128, [16, 32, 64, 128, 128]),
        (1.0, 32, [16, 32, 32]),
        (9.0, 16, [16, 16]),
    ],
)
def test_the_largest_size_that_fits_is_found_from_below(clock, per_token: float, chosen: int, ran: list[int]) -> None:
    end, seen = clock.now + 120, []

    def run(tokens: int) -> None:
        seen.append(tokens)
        clock.work(per_token * tokens)

    sizes = budget.halvings(256, 16)
    found = budget.largest_fitting(sizes, run, work=float, whole=lambda size: 2.0 * size, left=lambda: end - clock.now)
    assert (found, seen) == (chosen, ran)


def test_what_is_done_only_once_does_not_decide_the_size(clock) -> None:
    """The first run of all takes 30 seconds more, as where a compiler has its part in it."""
    seen = []

    def run(tokens: int) -> None:
        seen.append(tokens)
        clock.work(tokens / 100 + 30 * (len(seen) == 1))

    sizes, end = [16, 32, 64], clock.now + 60
    assert budget.largest_fitting(sizes, run, work=float, whole=float, left=lambda: end - clock.now) == 64
    assert seen == [16, 16]


def test_a_single_size_is_taken_without_a_run() -> None:
    assert budget.largest_fitting([7], pytest.fail, work=float, whole=float, left=lambda: -1.0) == 7


@pytest.mark.smoke
def test_halvings() -> None:
    assert budget.halvings(256, 16) == [16, 32, 64, 128, 256]
    assert budget.halvings(100, 8) == [12, 25, 50, 100]
    assert budget.halvings(5, 8) == [5] and budget.halvings(3, 1) == [1, 3]


@pytest.mark.parametrize(("seconds", "rounds"), [(math.inf, 9), (100, 9), (30, 4), (9, 2), (0, 2)])
def test_rounds_follow_the_time_that_is_left(clock, seconds: float, rounds: int) -> None:
    """A round takes 4 seconds, the first one 10."""
    end, told, calls = clock.now + seconds, [], []

    def fn() -> None:
        calls.append(clock.work(2 if calls else 8))

    found = timing.interleave(
        {"a": fn, "b": lambda: clock.work(2)}, device=CPU, rounds=9, warmup=0, least=2, left=lambda: end - clock.now,
        advance=lambda done, of: told.append((done, of)),
    )  # fmt: skip
    assert len(found["a"].samples) == len(found["b"].samples) == rounds
    assert told[-1] == (rounds, rounds) and [done for done, _ in told] == list(range(1, rounds + 1))


def test_the_rounds_that_are_asked_for_need_no_time(clock) -> None:
    found = timing.interleave({"a": lambda: clock.work(5)}, device=CPU, rounds=3, least=3, left=lambda: 0.0)
    assert len(found["a"].samples) == 3


def trial(error: float) -> dict[str, dict[str, float]]:
    return {"loss": {"eager": 0.1, "gci": 0.1, "bound": 1.0}, "dA": {"eager": 0.1, "gci": error, "bound": 1.0}}


@pytest.mark.parametrize(
    ("errors", "left", "made", "passes"),
    [
        ([0.5, 0.5, 0.5], 99, 3, True),
        ([0.5, 9.0, 9.0], 0, 1, True),  # no time for more
        ([9.0, 0.5, 0.5], 0, 3, True),  # one that failed is never the last word
        ([9.0, 0.5, 9.0], 0, 3, False),
        ([math.inf, math.inf, 0.5], 0, 3, False),
        ([0.5, 9.0, 9.0], 99, 3, False),
    ],
)
def test_little_time_never_makes_the_gate_fail(monkeypatch, errors, left: float, made: int, passes: bool) -> None:
    trials, told = iter(errors), []
    monkeypatch.setattr(correctness, "change_adapters", lambda model: None)
    monkeypatch.setattr(correctness, "_loss_and_grads", lambda model, ids: None)
    monkeypatch.setattr(correctness, "_trial", lambda *_: trial(next(trials)))
    models = {"eager": torch.nn.Identity(), "gci": torch.nn.Identity()}

    def check() -> dict:
        return correctness.check_model(
            models, torch.zeros(3, 4), left=lambda: left, advance=lambda *numbers: told.append(numbers)
        )

    if passes:
        assert check()["dA"]["gci"] == sorted(errors[:made])[made // 2]
    else:
        with pytest.raises(correctness.CorrectnessError, match="gci_kernels: dA differs"):
            check()
    assert told[-1] == (made, made)


# The dtypes


def test_a_dtype_is_fast_where_both_of_its_products_are() -> None:
    names = {"amx": Rates(900, 1100), "only forward": Rates(200, 3), "only dX": Rates(20, 160), "half": Rates(75, 75)}
    assert products.fast_dtypes({"float32": Rates(150, 160), **names}) == ("float32", "amx", "half")
    assert products.fast_dtypes({"float32": Rates(1, 1)}) == ("float32",)


def test_slower_dtypes_get_more_of_the_time_within_limits() -> None:
    others = {"a": Rates(125, 900), "b": Rates(999, 999), "c": Rates(9, 1)}
    found = products.slowness({"float32": Rates(150, 100), **others})
    assert found == {"float32": 1.0, "a": 0.8, "b": 0.5, "c": 2.0}


def test_rates_are_those_of_a_layers_two_products(monkeypatch) -> None:
    """The forward's product takes a millisecond, dX's, which multiplies with W itself, takes two."""
    monkeypatch.setattr(products, "SECONDS", 0.0)
    seen = []

    class Operand:
        def __init__(self, shape: tuple[int, int], transposed: bool = False) -> None:
            self.shape, self.transposed = shape, transposed

        def to(self, dtype: torch.dtype) -> "Operand":
            return self

        def t(self) -> "Operand":
            return Operand(self.shape[::-1], not self.transposed)

        def __matmul__(self, other: "Operand") -> None:
            assert self.shape[1] == other.shape[0]
            seen.append(other.transposed)
            clock.work(1e-3 if other.transposed else 2e-3)

    clock = Clock(monkeypatch)
    monkeypatch.setattr(torch, "randn", lambda *shape: Operand(shape))
    rates = products.product_rates(torch.bfloat16)
    assert seen == [True, True, False, False]  # each once before it counts
    assert rates.forward == pytest.approx(2 * 128 * 256 * 256 / 1e-3 / 1e9) and rates.slower == pytest.approx(
        rates.forward / 2
    )


def test_the_measurement_takes_a_fraction_of_a_second() -> None:
    threads = torch.get_num_threads()
    rates = products.product_rates(torch.float32)
    assert rates.forward > 0 and rates.dx > 0 and torch.get_num_threads() == threads
