"""One call of an adapted layer enters few Python functions: what bench.calls counts stays under what is promised."""

import pytest
import torch
from torch import nn

from gci_kernels.bench import calls

# Situation -> the most functions that a layer of each method below enters.
LIMITS = {calls.training_forward: 35, calls.decoding_step: 20}


@pytest.mark.parametrize("situation", LIMITS, ids=lambda situation: situation.__name__)
@pytest.mark.parametrize("method", ["lora", "loramoe", "alora", "loki"])
def test_the_way_stays_short(method, situation, one_thread):
    measured = calls.measure(method, situation)
    entered = "\n".join(f"{code.co_filename}:{code.co_firstlineno} {code.co_name}" for code in measured.entered)
    assert measured.count <= LIMITS[situation], f"{measured.count} functions are entered, in this order:\n{entered}"


def test_the_way_of_a_kept_copy(monkeypatch, one_thread):
    """From 16 tokens on LoKI's layer compares its copy of the weight in each call."""
    monkeypatch.setattr(calls, "TOKENS", 64)
    measured = calls.measure("loki", calls.training_forward)
    assert any(code.co_name == "renewed" for code in measured.entered)
    assert measured.count <= LIMITS[calls.training_forward]


class Layer(nn.Linear):
    """Its call enters two functions of nn.Module, and forward, helper and the lambda in this file."""

    def forward(self, x):
        return self.helper([x for x in (x,)][0])

    def helper(self, x):
        return (lambda: x)()


def test_what_is_counted(one_thread):
    """Functions between the layer's call and its return, no others, in order; a comprehension is none of them."""
    layer, other = Layer(2, 2), Layer(2, 2)
    x = torch.ones(2)
    measured = calls.record(layer, lambda: (other(x), layer(x), other(x)))
    names = [code.co_name for code in measured.entered]
    assert names == ["_wrapped_call_impl", "_call_impl", "forward", "helper", "<lambda>"]
    assert (measured.count, measured.file_changes) == (5, 1)


def test_the_layer_is_called_once(one_thread):
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="called 0 times"):
        calls.record(layer, lambda: None)


def test_table(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench.calls", "--list"])
    calls.main()
    output = capsys.readouterr().out
    assert "decoding step" in output and "nn/modules/module.py" in output
    assert all(method in output for method in calls.configs())
