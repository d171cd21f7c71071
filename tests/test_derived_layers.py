"""LoKI on layers derived from torch.nn.Linear: its rows stand for W alone, so the layer must compute with W alone."""

import pytest
import torch
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear

from gci_kernels import LoKIConfig, patch
from gci_kernels.accuracy import relative_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Rounding(nn.Linear):
    """As layers that quantise what they are given."""

    def forward(self, x):
        scale = x.abs().amax(-1, keepdim=True) / 7
        return super().forward((x / scale).round() * scale)


class Tuple(nn.Linear):
    def forward(self, x):
        return super().forward(x), None


@pytest.mark.parametrize("kind", (Doubling, Rounding, Tuple))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", (True, False))
def test_something_else_is_refused(kind, dtype, bias):
    model = nn.Sequential(kind(48, 12, bias=bias, dtype=dtype))
    with pytest.raises(ValueError, match=f"LoKI cannot adapt 0: a {kind.__name__} computes something else"):
        patch(model, LoKIConfig(positions={"0": [1, 5]}))
    assert type(model[0]) is kind


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", (True, False))
def test_the_same_in_other_words_is_adapted(dtype, bias):
    torch.manual_seed(0)
    model = nn.Sequential(FalconLinear(512, 12, bias=bias, dtype=dtype))
    x = torch.randn(3, 512, dtype=dtype)
    plain = model(x)
    before = torch.get_rng_state()
    patched = patch(model, LoKIConfig(positions={"0": [1, 5]}))
    assert relative_error(patched(x), plain) < 8 * torch.finfo(dtype).eps
    assert torch.equal(torch.get_rng_state(), before)  # nothing is drawn to find out
