"""The layer cases for pytest-benchmark: `pytest bench --benchmark-only`. Each is checked before it is timed."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from gci_kernels.bench.cases import CASES, LayerVariant, layer_variants, make_inputs
from gci_kernels.bench.correctness import check_layer


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name.replace(" ", "-"))
def variants(request: pytest.FixtureRequest) -> dict[str, LayerVariant]:
    """One case's frozen, eager and fused layer, checked."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = make_inputs(request.param, device)
    made = layer_variants(inputs)
    check_layer(inputs, made)
    return made


@pytest.mark.parametrize("column", ["frozen", "eager", "gci"])
def test_layer(
    benchmark: BenchmarkFixture, variants: dict[str, LayerVariant], column: str, request: pytest.FixtureRequest
) -> None:
    """Times one forward and backward of one column."""
    benchmark.group = request.node.callspec.params["variants"].name

    def step() -> None:
        variants[column].step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    # With a setup before every step, pytest-benchmark cannot choose the number of rounds itself.
    benchmark.pedantic(step, setup=variants[column].change, rounds=10, warmup_rounds=1)
