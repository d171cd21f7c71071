"""Times of kernels beside the library's: measured once, kept in a record, and what "auto" reads from them."""

import argparse
import json

import pytest
import torch
from toy_gpu import GPU, TIMES, forget, ship

from gci_kernels import hardware
from gci_kernels.hardware import proving, timing

pytestmark = pytest.mark.usefixtures("imagined_gpu")
HALF = torch.bfloat16


def of(times: dict) -> int | None:
    return hardware.make_record("gate", GPU, True, times=times).start


def test_a_kernel_is_taken_from_the_fewest_tokens_from_which_it_is_no_slower():
    assert of({}) is None and of(TIMES) == 1024
    assert of({"a": [(1, 1.0, 1.0), (2, 1.0, 0.5)]}) == 1, "as fast counts"
    assert of({"a": [(1, 1.0, 2.0), (2, 1.0, 3.0)]}) is None
    assert of({"a": [(1, 1.0, 0.5), (2, 1.0, 2.0), (4, 1.0, 0.5)]}) == 4, "faster for a few tokens, slower for more"
    assert of({"a": [(1, 1.0, 2.0), (2, 1.0, 2.0)], "b": [(1, 3.0, 2.0), (2, 3.0, 1.0)]}) == 1, "all stages together"


def test_a_proved_kernel_is_timed_once_and_its_times_are_kept(self_checks, monkeypatch):
    timed = []
    monkeypatch.setattr(timing, "measure", lambda kernel, dtype, device: timed.append((kernel, dtype)) or TIMES)
    assert hardware.start("project", HALF) == hardware.start("project", HALF) == 1024
    assert timed == [("project", HALF)] and self_checks == ["project"]
    assert hardware.find("project", GPU, "bfloat16").times == {"forward": [list(row) for row in TIMES["forward"]]}
    forget()  # another process
    assert hardware.start("project", HALF) == hardware.recorded("project", HALF, GPU) == 1024
    # With dropout it is another variant to check, but the times are those without.
    assert hardware.start("project", HALF, dropout=True) == 1024 and self_checks == ["project", "project"]
    assert hardware.start("attention", HALF) == 16 and len(timed) == 1
    with pytest.warns(RuntimeWarning, match="'expand' failed"):
        assert hardware.start("expand", HALF) is None
    assert len(timed) == 1, "a kernel that is wrong is not timed"


def test_shipped_times_count_without_a_measurement(tmp_path, self_checks, monkeypatch):
    monkeypatch.setattr(timing, "measure", lambda *_: pytest.fail("nothing is to be measured"))
    ship(tmp_path, hardware.make_record("project", GPU, True, times=TIMES))
    assert hardware.start("project", HALF, dropout=True) == 1024 and self_checks == []


def test_a_shipped_proof_without_times_is_timed_here(tmp_path, self_checks):
    ship(tmp_path, hardware.make_record("project", GPU, True))
    assert hardware.recorded("project", HALF, GPU) is None
    assert hardware.start("project", HALF) == 1024 and self_checks == []
    assert hardware.recorded("project", HALF, GPU) == 1024


@pytest.mark.parametrize("forbidden", (True, False))
def test_nothing_is_timed_where_it_is_forbidden_or_would_be_captured(tmp_path, monkeypatch, self_checks, forbidden):
    ship(tmp_path, hardware.make_record("project", GPU, True))
    if forbidden:
        monkeypatch.setenv("GCI_SELF_CHECK", "0")
    monkeypatch.setattr(proving, "_capturing", lambda: not forbidden)
    assert hardware.start("project", HALF) is None and hardware.proves("project", HALF)
    monkeypatch.delenv("GCI_SELF_CHECK", raising=False)
    monkeypatch.setattr(proving, "_capturing", lambda: False)
    assert hardware.start("project", HALF) == 1024


def test_a_kernel_that_fails_while_it_is_timed_is_left_out(self_checks, monkeypatch):
    def fails(kernel, dtype, device):
        raise error

    monkeypatch.setattr(timing, "measure", fails)
    error = torch.OutOfMemoryError("full")
    with pytest.warns(RuntimeWarning, match="could not be checked .* no memory for the check: full"):
        assert hardware.start("project", HALF) is None
    assert hardware.proves("project", HALF) and not hardware.find("project", GPU, "bfloat16").times
    proving._not_before.clear()
    error = RuntimeError("illegal address")
    with pytest.warns(RuntimeWarning, match="failed its check .* RuntimeError: illegal address"):
        assert hardware.start("project", HALF) is None
    assert not hardware.proves("project", HALF)


@pytest.fixture
def small(monkeypatch):
    """What is measured, in a size that a CPU has at once."""
    monkeypatch.setattr(timing, "_SIZE", 256)


def test_what_is_measured(small):
    """Each stage of the kernel by the library and by the kernel, for each number of tokens; with the timer given."""
    ran = []

    def timer(library, kernel):
        ran.append((library.args[0]["x"].shape, library.args[1]))
        assert library.func is not kernel.func and library.args == kernel.args
        return 1.23456e-5, 2e-5

    times = timing.measure("reduce", HALF, torch.device("cpu"), timer)
    assert list(times) == ["backward: dU, dB", "backward: dA"]
    expected = [(tokens, 1.23e-5, 2e-5) for tokens in timing.TOKENS]
    assert list(times.values()) == [expected] * 2 and len(json.dumps(times)) < 300
    assert {(shape[0], dtype) for shape, dtype in ran} == {(tokens, HALF) for tokens in timing.TOKENS}


@pytest.mark.parametrize("kernel", hardware.KERNELS)
def test_every_triton_kernel_but_attention_has_stages_to_be_timed_by(kernel, small):
    assert hardware.get(kernel).timed == (hardware.get(kernel).language == "triton" and kernel != "attention")
    assert bool(timing._stages(kernel, 128, HALF, torch.device("cpu"))) == hardware.get(kernel).timed


def test_the_two_are_timed_in_turns_by_events(monkeypatch):
    """The medians of rounds, by the calls of a round; nothing counts before both have been compiled."""
    now, rounds = (
        [0.0],
        {"library": iter((9.0, 9.0, 1.0, 2.0, 9.0, 3.0, 2.0)), "kernel": iter((50.0, 50.0) + (4.0,) * 5)},
    )
    order = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def elapsed_time(self, end):
            return end.at - self.at

    def call(name):
        order.append(name)
        repeated = len(order) > 4 and (len(order) - 5) % timing._CALLS
        now[0] += 0.0 if repeated else next(rounds[name])

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: argparse.Namespace(synchronize=lambda: None))
    seconds = timing.by_events(lambda: call("library"), lambda: call("kernel"))
    assert seconds == (pytest.approx(2e-3 / timing._CALLS), pytest.approx(4e-3 / timing._CALLS))
    assert order == ["library", "kernel"] * 2 + (["library"] * 5 + ["kernel"] * 5) * 5
