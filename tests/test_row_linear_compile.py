"""row_linear's Triton kernel compiled for real chips without one: no spills, no stack, copies that run ahead."""

import pytest
import torch
from architectures import ARCHITECTURES, compile_within_limits

from gci_kernels.bench.launches import ROW_SHAPES, launches
from gci_kernels.hardware import Shape
from gci_kernels.hardware.chips import CAPABILITIES
from gci_kernels.ops import launching
from gci_kernels.ops.row_linear import config

ODD_SHAPES = [Shape(tokens, 896, 4096, 0, 0, 0, 89) for tokens in (1, 16, 100)] + [Shape(8192, 4097, 4099, 0, 0, 0, 17)]
# Triton makes a constant of an argument that is 1.
ONES = [Shape(1, 1, 1, 0, 0, 0, 1), Shape(1, 16, 1, 0, 0, 0, 1), Shape(1, 1, 16, 0, 0, 0, 2)]


def check(cases, chip, dtype, active_dtype):
    """Compiles each different launch once; how many of forward and of dX."""
    seen = dict.fromkeys(launch for case in cases for launch in launches(case, chip, dtype, active_dtype))
    for launch in seen:
        used, assembly = compile_within_limits(launch, chip)
        assert launch.name == "row_linear"
        given = dict(launch.constants) | dict(launch.options)
        if dtype == torch.bfloat16 and given["BLOCK_T"] >= 64 and {"depth", "width"} <= set(launch.aligned):
            assert "wgmma" in assembly or chip != "sm_90", str(launch)
            if chip != "gfx942":  # 16 bytes at a time into tiles for all stages but the one in use
                tiles = 2 * given["BLOCK_K"] * (given["BLOCK_T"] + given["BLOCK_N"])
                assert "cp.async.cg" in assembly, str(launch)
                assert used.shared >= (given["num_stages"] - 1) * tiles, f"{launch}: {used}"
    sums = [dict(launch.constants)["SUM_ROWS"] for launch in seen]
    return sums.count(False), sums.count(True)


@pytest.mark.parametrize("chip", ARCHITECTURES)
def test_training_in_bfloat16(chip):
    assert min(check(ROW_SHAPES, chip, torch.bfloat16, torch.float32)) >= 1


@pytest.mark.parametrize("chip", ARCHITECTURES)
def test_the_kernel_sees_active_rows_in_xs_dtype(chip):
    for case in ROW_SHAPES:
        made = (launches(case, chip, torch.bfloat16, dtype) for dtype in (torch.float32, torch.bfloat16))
        assert next(made) == next(made)


@pytest.mark.parametrize("chip", ARCHITECTURES)
def test_sizes_of_one(chip):
    check(ONES, chip, torch.bfloat16, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("chip", ARCHITECTURES)
def test_odd_sizes_and_other_dtypes(chip, dtype):
    check(ODD_SHAPES + ROW_SHAPES, chip, dtype, torch.float32)


@pytest.mark.parametrize("capability", (*CAPABILITIES, "sm_75", "gfx1100"))
@pytest.mark.parametrize("dtype", launching.DTYPES, ids=str)
def test_choices_are_pure_and_within_bounds(capability, dtype):
    for tokens in (1, 15, 64, 513, 8192, launching.MAX_SIZE):
        for depth, width in ((1, 1), (896, 4864), (4097, 33), (14336, 4096)):
            for sum_rows in (False, True):
                arguments = (tokens, depth, width, dtype, capability, sum_rows)
                chosen = config.choose_row_linear_config(*arguments)
                assert chosen == config.choose_row_linear_config(*arguments)
                assert hash(chosen) == hash(config.choose_row_linear_config(*arguments))
                for block in (chosen.block_t, chosen.block_n, chosen.block_k):
                    assert 16 <= block <= 256 and block & (block - 1) == 0


def test_unknown_chips_count_as_small():
    arguments = (8192, 4096, 4096, torch.bfloat16)
    small, other, large = (config.choose_row_linear_config(*arguments, c, False) for c in ("sm_75", "gfx1100", "sm_86"))
    assert small == other != large
