"""Fixtures shared by several files."""

import os

import hypothesis
import pytest
import torch

# CI tries the same examples every time; a developer's runs look for new ones.
hypothesis.settings.register_profile("ci", derandomize=True)
if "CI" in os.environ:
    hypothesis.settings.load_profile("ci")


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
