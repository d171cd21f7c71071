"""The Triton kernels compiled for real chips without one: every launch of a training step at the shapes of two models.

What the compiler made is read back: no spills, shared memory within the chip's, and Hopper's own matrix instructions.
"""

import pytest
import torch
from architectures import ARCHITECTURES, compile_within_limits

from gci_kernels.bench import resources, sass
from gci_kernels.bench.launches import SHAPES, launches, record
from gci_kernels.hardware import Shape
from gci_kernels.hardware.chips import CAPABILITIES, chip_of_capability
from gci_kernels.ops import launching
from gci_kernels.ops.bottleneck import config
from gci_kernels.ops.bottleneck import triton as stages

KERNELS = {"project_fwd", "expand_fwd", "reduce_fwd", "project_reduce_fwd", "sum_splits", "gate_fwd", "gate_bwd"}
PERSISTENT = {"expand_persistent"}
ODD_SHAPES = [Shape(tokens, 4096, 4096, 160, 0, 0) for tokens in (1, 16, 100)] + [Shape(8192, 4097, 4099, 17, 0, 0)]
# Triton makes a constant of an argument that is 1.
ONES = [Shape(1, 1, 1, 1, 0, 0), Shape(1, 16, 1, 1, 1, 1), Shape(1, 1, 16, 2, 2, 2)]


def check(cases, chip, dtype, adapter_dtype, **dropout):
    """Compiles each different launch once; the names of the kernels seen."""
    seen = dict.fromkeys(launch for case in cases for launch in launches(case, chip, dtype, adapter_dtype, **dropout))
    for launch in seen:
        _, assembly = compile_within_limits(launch, chip)
        if chip == "sm_90" and launch.name.startswith("expand") and dtype == torch.bfloat16:
            assert "wgmma" in assembly or dict(launch.constants)["BLOCK_T"] < 64, str(launch)
    return {launch.name for launch in seen}


def launched(chip):
    """The kernels of a step without dropout."""
    return KERNELS - {"expand_fwd"} | PERSISTENT if chip == "sm_90" else KERNELS


@pytest.mark.parametrize("chip", ARCHITECTURES)
def test_training_in_bfloat16(chip):
    """With adapters in float32, PEFT's default."""
    assert check(SHAPES, chip, torch.bfloat16, torch.float32) == launched(chip)


# One chip shows it every time: the launches differ from those above in how a narrow operand is loaded.
@pytest.mark.parametrize(
    "chip", [name if name == "sm_90" else pytest.param(name, marks=pytest.mark.slow) for name in CAPABILITIES]
)
def test_adapters_in_the_models_dtype(chip):
    assert check(SHAPES, chip, torch.bfloat16, torch.bfloat16) == launched(chip)


@pytest.mark.parametrize("chip", ARCHITECTURES)
def test_dropout_inside_the_products(chip):
    """One kernel makes the mask, and the products read it."""
    expected = KERNELS | {"dropout_bits"} | (PERSISTENT if chip == "sm_90" else set())  # y has no mask, dX has one
    assert check(SHAPES, chip, torch.bfloat16, torch.float32, dropout_p=0.05) == expected


@pytest.mark.smoke
@pytest.mark.parametrize("chip", ARCHITECTURES)
def test_dropout_by_itself(chip):
    def step():
        stages.dropout(torch.empty(8192, 4096, dtype=torch.bfloat16, device="meta"), 0.05, 2**61 + 1)

    (call,) = record(step, chip)
    compile_within_limits(call.launch, chip)
    assert call.launch.name == "dropout_fwd"


@pytest.mark.parametrize("chip", ARCHITECTURES)
def test_sizes_of_one(chip):
    check(ONES, chip, torch.bfloat16, torch.float32)


def test_the_main_loops_on_hopper():
    """Products are ahead of every wait, or one wait covers all; none is serialised by the assembler."""
    found = list(sass.codes([Shape(8192, 4096, 4096, 16, 0, 0)], "sm_90"))
    names = {"project_fwd", "reduce_fwd", "project_reduce_fwd", "expand_persistent", "expand_fwd"}
    assert {code.launch.name for code in found} == names
    for code in found:
        assert not code.advice and code.loop.drains <= 1, code
        if code.launch.name.startswith("expand"):  # under dropout too
            loop = code.loop
            assert loop.drains == 0 and loop.in_flight == loop.products == 4 and loop.bulk_loads == 2, code
            assert loop.cycles == loop.matrix == 128 * 256 * 64 / 2048, code


def test_reading_the_mask_costs_less_than_the_memory_that_is_read():
    """Project and reduce read a tile of two-byte numbers at 3.35 TB/s shared by 132 multiprocessors of 1.755 GHz."""
    for code in sass.codes([Shape(8192, 4096, 4096, 16, 0, 0)], "sm_90", (0.05,)):
        blocks = dict(code.launch.constants)
        if code.launch.name in ("project_fwd", "reduce_fwd") and blocks["DROPOUT"]:
            columns = blocks["BLOCK_K" if code.launch.name == "project_fwd" else "BLOCK_N"]
            memory = 2 * blocks["BLOCK_T"] * columns / (3.35e12 / 132 / 1.755e9)
            assert code.loop.cycles < memory, code


@pytest.mark.parametrize("chip", ("sm_89", "sm_120"))
def test_the_largest_tiles_fit_99_kib(chip):
    """Of 99 KiB that a program may take: the tiles of `expand` for many tokens, and for a few."""
    for tokens in (8192, 100):
        made = launches(Shape(tokens, 4096, 4096, 16, 0, 0), chip, torch.bfloat16, torch.float32)
        tiles = next(launch for launch in made if launch.name == "expand_fwd")
        used, _ = compile_within_limits(tiles, chip)
        assert used.shared > 64 * 1024, f"{tiles}: {used}"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("chip", ARCHITECTURES)
def test_odd_sizes_and_other_dtypes(chip, dtype):
    check(ODD_SHAPES + SHAPES[:4], chip, dtype, torch.float32)


@pytest.mark.parametrize("capability", (*CAPABILITIES, "sm_75", "gfx1100"))
@pytest.mark.parametrize("dtype", launching.DTYPES, ids=str)
def test_choices_are_pure_and_within_bounds(capability, dtype):
    for tokens in (1, 15, 64, 513, 8192, launching.MAX_SIZE):
        for depth, width, rank in ((1, 1, 1), (64, 16, 16), (896, 4864, 16), (4097, 33, 40), (14336, 4096, 513)):
            arguments = (tokens, depth, width, rank, dtype, capability)
            expand = config.choose_expand_config(*arguments)
            assert expand == config.choose_expand_config(*arguments)
            assert hash(expand) == hash(config.choose_expand_config(*arguments))
            for block in (expand.block_t, expand.block_n, expand.block_k, expand.block_r):
                assert 16 <= block <= 256 and block & (block - 1) == 0
            assert not expand.persistent or rank <= expand.block_r and expand.block_n >= 64
            project = config.choose_project_config(tokens, depth, rank, dtype, capability)
            reduce = config.choose_reduce_config(tokens, rank, width, dtype, capability)
            if dtype != torch.float32:  # tiles of both operands for all stages but one fit shared memory
                tiles = 2 * expand.block_k * (expand.block_t + expand.block_n)
                assert (expand.num_stages - 1) * tiles <= chip_of_capability(capability).shared
            # Every program of a sum has something to add.
            both = config.choose_project_reduce_config(tokens, width, rank, dtype, capability)
            for length, block, splits in (
                (depth, project.block_k, project.splits),
                (tokens, reduce.block_t, reduce.splits),
                *([(tokens, both.block_t, both.splits)] if both else []),
            ):
                steps = -(-length // block)
                assert splits >= 1 and (splits - 1) * -(-steps // splits) < steps
            assert rank > project.block_n or project.block_n < max(32, 2 * rank), "more padding than the rank"


def test_one_reading_of_dy_where_it_moves_fewer_bytes():
    """Partial sums are written and read once more, in float32: at few tokens they are more than a second reading."""
    for rank in (16, 32):
        assert config.choose_project_reduce_config(8192, 4096, rank, torch.bfloat16, "sm_90") is not None
        assert config.choose_project_reduce_config(256, 4096, rank, torch.bfloat16, "sm_90") is None
    assert config.choose_project_reduce_config(8192, 4096, 16, torch.float32, "sm_90") is None
    # k and v of a model with few of them: narrower blocks, so that there are programs enough.
    narrow = config.choose_project_reduce_config(8192, 1024, 16, torch.bfloat16, "sm_90")
    assert narrow is not None and narrow.block_n == 256


def test_unknown_chips_count_as_small():
    arguments = (8192, 4096, 4096, 16, torch.bfloat16)
    small, other, large = (config.choose_expand_config(*arguments, name) for name in ("sm_75", "gfx1100", "sm_86"))
    assert small == other != large


def test_launches_are_what_a_launcher_would_launch():
    """The strides that are 1 and the arguments divisible by 16 are Triton's business, so they are part of a launch."""
    case = Shape(512, 896, 4864, 16, 0, 0)
    made = [each for each in launches(case, "sm_100", torch.bfloat16, torch.float32) if each.name == "expand_fwd"]
    forward = next(each for each in made if not dict(each.constants)["W_BY_ROWS"])
    constants, types = dict(forward.constants), dict(forward.types)
    assert constants["stride_xk"] == constants["stride_wk"] == 1 and "stride_wn" not in constants
    assert types["x_ptr"] == "tensordesc<bf16[128, 64]>" and types["w_ptr"] == "tensordesc<bf16[128, 64]>"
    assert types["u_ptr"] == "*bf16" and types["m_ptr"] == "*fp32" and types["tokens"] == "i32"
    assert {"u_ptr", "tokens", "depth", "width"} <= set(forward.aligned)
    assert len(set(made)) == len(made) == 3
    assert "seed_ptr" not in forward.aligned, "a seed at another address must not compile anew"


def test_table(monkeypatch, capsys):
    monkeypatch.setattr(resources, "SHAPES", [Shape(512, 896, 896, 16, 0, 0)])
    monkeypatch.setattr(resources, "ROW_SHAPES", [])
    resources.main(["--chip", "sm_90"])
    table = capsys.readouterr().out
    assert "expand_persistent" in table and "sm_90" in table and "occupancy" in table
