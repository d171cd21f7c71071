"""The attention's Triton kernels compiled for real chips without one: no spills, no stack, shared memory that fits."""

import pytest
import torch
from architectures import ARCHITECTURES, compile_within_limits

from gci_kernels.bench.launches import record
from gci_kernels.hardware.chips import CAPABILITIES
from gci_kernels.ops import launching
from gci_kernels.ops.attention import config
from gci_kernels.ops.attention import triton as attention

KERNELS = {"attention_fwd", "attention_bwd_dq", "attention_bwd_dkv"}
# r, num_heads: heads that are padded to a tile's 16 columns, and wider ones; others compile to the code of one of them
WIDTHS = [(16, 4), (128, 4)]
ODD_WIDTHS = [(64, 8), (256, 4), (48, 3), (5, 5), (1, 1)]


def launches(chip, dtype, sizes, segmented=(False, True), backward=True):
    """Everything that the launchers start on such a chip for [batch, time, keys, r, num_heads], without repeats."""

    def step(batch, time, keys, r, num_heads, with_segments):
        q, k, v = torch.empty(batch, keys, 3 * r, dtype=dtype, device="meta").split(r, dim=2)
        q = q[:, keys - time :]
        segments = torch.empty(batch, keys, dtype=torch.int32, device="meta") if with_segments else None
        o, lse = attention.forward(q, k, v, num_heads, segments)
        if backward:
            attention.backward(torch.empty_like(o), q, k, v, o, lse, num_heads, segments)

    made = [call for size in sizes for each in segmented for call in record(lambda: step(*size, each), chip)]  # noqa: B023
    return list(dict.fromkeys(call.launch for call in made))


def check(chip, made):
    """Compiles each; the matrix instructions of Hopper where there is one."""
    for launch in made:
        _, assembly = compile_within_limits(launch, chip)
        if chip == "sm_90" and dict(launch.types)["q_ptr"] == "*bf16" and dict(launch.constants)["BLOCK_T"] == 64:
            assert "wgmma" in assembly, str(launch)


@pytest.mark.parametrize("chip", ARCHITECTURES)
def test_training_in_bfloat16(chip):
    sizes = [(2, time, time, *width) for width in WIDTHS for time in (2048, 8192)]
    # Both lengths are multiples of 16, which is all that the compiler sees of them.
    made = launches(chip, torch.bfloat16, sizes)
    assert {launch.name for launch in made} == KERNELS and len(made) == 2 * len(KERNELS) * len(WIDTHS)
    check(chip, made)


@pytest.mark.parametrize("chip", ARCHITECTURES)
def test_decoding_in_bfloat16(chip):
    made = launches(chip, torch.bfloat16, [(1, 1, 4096, *width) for width in WIDTHS], backward=False)
    assert len(made) == 2 * len(WIDTHS)
    check(chip, made)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("chip", ARCHITECTURES)
def test_odd_sizes_and_other_dtypes(chip, dtype):
    sizes = [(1, 1, 1, *width) for width in WIDTHS] + [(3, 33, 100, *width) for width in WIDTHS + ODD_WIDTHS]
    check(chip, launches(chip, dtype, sizes + [(2, 2048, 2048, *width) for width in ODD_WIDTHS]))


@pytest.mark.parametrize("capability", (*CAPABILITIES, "sm_75", "gfx1100"))
@pytest.mark.parametrize("dtype", launching.DTYPES, ids=str)
def test_choices_are_pure_and_within_bounds(capability, dtype):
    for r, num_heads in WIDTHS + ODD_WIDTHS:
        chosen = config.choose_attention_config(r, num_heads, dtype, capability)
        assert chosen == config.choose_attention_config(r, num_heads, dtype, capability)
        assert hash(chosen) == hash(config.choose_attention_config(r, num_heads, dtype, capability))
        assert r // num_heads <= chosen.block_d <= max(16, 2 * r // num_heads)
        for tile in (chosen.fwd, chosen.dq, chosen.dkv):
            assert all(size in (16, 32, 64) for size in (tile.block_t, tile.block_k))


def test_unknown_chips_count_as_small():
    arguments = (16, 4, torch.bfloat16)
    small, other, large = (config.choose_attention_config(*arguments, name) for name in ("sm_75", "gfx1100", "sm_86"))
    assert small == other != large
