"""Fixtures shared by several files."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

import gci_kernels

# CI tries the same examples every time; a developer's runs look for new ones. The tests that need a GPU do without.
if importlib.util.find_spec("hypothesis"):
    import hypothesis

    hypothesis.settings.register_profile("ci", derandomize=True)
    if "CI" in os.environ:
        hypothesis.settings.load_profile("ci")

# bench/gpu.py tests a checkout in which nothing is installed: bench/ lies beside the package there, not in it.
if importlib.util.find_spec("gci_kernels.bench") is None:
    gci_kernels.__path__.append(str(Path(__file__).parents[1]))


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers in every run."""
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """Fills every fresh torch.empty with NaN (integers: the largest value), so that an unwritten output shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def one_thread():
    """Tiny models gain nothing from more threads, and wait for them where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
