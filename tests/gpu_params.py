"""Parameters of tests that prove kernels."""

from collections.abc import Iterable

import pytest


def kernel_params(names: Iterable[str]) -> list:
    """Each name of a kernel as a parameter that attaches the test to this kernel."""
    return [pytest.param(name, marks=pytest.mark.kernel(name)) for name in names]
