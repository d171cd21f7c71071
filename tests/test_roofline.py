"""The count of bytes and operations: the issue's shape, hand-counted small cases, and the cache."""

import dataclasses

import pytest
import torch

from gci_kernels.bench import costs, roofline, traffic
from gci_kernels.bench.costs import (
    Cost,
    bottleneck_floor,
    frozen_floor,
    row_floor,
    total_seconds,
)
from gci_kernels.bench.launches import record
from gci_kernels.bench.traffic import PLANS, count
from gci_kernels.hardware import Shape
from gci_kernels.hardware.chips import CHIPS
from gci_kernels.ops.bottleneck import triton as stages

H200 = CHIPS["h200"]
LORA, LORAMOE = Shape(8192, 4096, 4096, 16, 0, 0), Shape(8192, 4096, 4096, 32, 8, 8)


def total(entries):
    return sum(entry.moved for entry in entries)


@pytest.mark.parametrize("adapter_dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("case", (LORA, LORAMOE), ids=("lora", "loramoe"))
def test_the_plan_moves_at_most_1_15_of_the_floor(case, adapter_dtype):
    entries, _ = count(case, torch.bfloat16, adapter_dtype, H200)
    assert 1 <= total(entries) / total(bottleneck_floor(case, torch.bfloat16, adapter_dtype)) <= 1.15


@pytest.mark.parametrize("dropout_p", (0.0, 0.05))
@pytest.mark.parametrize("case", (LORA, LORAMOE), ids=("lora", "loramoe"))
def test_no_temporary_of_tokens_by_features_but_y_and_dx(case, dropout_p):
    _, allocated = count(case, torch.bfloat16, torch.bfloat16, H200, dropout_p=dropout_p)
    y = 8192 * 4096 * 2
    assert sorted(allocated)[-2:] == [y, y] and sorted(allocated)[-3] <= y / 4
    _, allocated = count(LORAMOE, torch.bfloat16, torch.bfloat16, H200, plan=PLANS["aten"], dropout_p=0.05)
    assert sum(size >= y for size in allocated) > 2, "the count sees the library plan's masked copies"


@pytest.mark.smoke
def test_floor_by_hand():
    """2 tokens, 3 to 5, two experts of rank 1, float32: every operand and result of every stage."""
    entries = {entry.name: entry for entry in bottleneck_floor(Shape(2, 3, 5, 2, 2, 2), torch.float32, torch.float32)}
    numbers = {name: entry.moved / 4 for name, entry in entries.items()}
    assert numbers == {
        "forward: project": 6 + 12 + 8,
        "forward: mix": 8 + 4 + 4,
        "forward: expand": 6 + 15 + 4 + 10 + 10,
        "backward: dU, dB": 10 + 10 + 4 + 4 + 10,
        "backward: mix": 4 + 8 + 8 + 4,
        "backward: dX": 10 + 15 + 8 + 12 + 6,
        "backward: dA": 6 + 8 + 12,
    }
    assert entries["forward: expand"].operations == 2 * 2 * 3 * 5 + 2 * 2 * 2 * 5
    assert total(frozen_floor(Shape(2, 3, 5, 2, 2, 2), torch.float32)) / 4 == 2 * (6 + 15 + 10)


def test_operations_do_not_depend_on_the_plan():
    for case in (LORA, LORAMOE):
        least = sum(entry.operations for entry in bottleneck_floor(case, torch.bfloat16, torch.bfloat16))
        for plan in PLANS.values():
            entries, _ = count(case, torch.bfloat16, torch.bfloat16, H200, plan=plan)
            assert sum(entry.operations for entry in entries) == least


def test_the_library_plan_reads_y_again():
    """The library's product, then `addmm_`: y and dX are each written, read and written once more."""
    triton, _ = count(LORAMOE, torch.bfloat16, torch.bfloat16, H200)
    aten, _ = count(LORAMOE, torch.bfloat16, torch.bfloat16, H200, plan=PLANS["aten"])
    assert total(aten) - total(triton) >= 3.5 * 8192 * 4096 * 2


def product_reads(tokens, depth, width, chip):
    def tensor(*shape):
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

    u, m, x, w = tensor(tokens, 16), tensor(16, width), tensor(tokens, depth), tensor(depth, width)
    (call,) = record(lambda: stages.expand(u, m, x, w, None), chip.capability)
    sizes = {"x": tokens * depth * 2, "w": depth * width * 2}
    return traffic._product_reads(call, sizes, chip), sizes


def test_a_small_cache_makes_the_product_read_again():
    reads, sizes = product_reads(8192, 4096, 4096, H200)
    assert reads == sum(sizes.values())
    tiny = dataclasses.replace(H200, cache=1_000_000)
    reads, sizes = product_reads(8192, 4096, 4096, tiny)
    # 1,024 tiles in waves of 132, that is 8 rows by 16 columns: each wave reads all of w and its own rows of x.
    assert reads >= sizes["x"] + 7 * sizes["w"]


def test_a_wide_layer_reads_less_in_squares():
    """4096 to 14336: w alone is more than the cache, so the order of tiles decides how often it is read."""
    reads, sizes = product_reads(8192, 4096, 14336, H200)
    assert reads < 3 * sum(sizes.values())


def test_every_tile_has_one_program():
    for tiles_t, tiles_n, group in ((64, 16, 8), (5, 3, 8), (13, 7, 4), (1, 1, 8)):
        tiles = [traffic._tile(pid, tiles_t, tiles_n, group) for pid in range(tiles_t * tiles_n)]
        assert sorted(tiles) == [(t, n) for t in range(tiles_t) for n in range(tiles_n)]


def test_time_is_the_larger_of_memory_and_arithmetic():
    entries = [Cost("memory", 4.8e12), Cost("arithmetic", 1.0, 989e12)]
    assert total_seconds(entries, H200, torch.bfloat16) == pytest.approx(2.0)
    assert total_seconds(entries, H200, torch.float32) > 10


def decoder_layer(rank, experts, plan="triton", **how):
    groups = traffic.llama_8b(8192, rank, experts)
    return traffic.count_decoder_layer(groups, torch.bfloat16, torch.bfloat16, H200, plan=PLANS[plan], **how)


def test_a_decoder_layer_whose_projections_share_x():
    """By hand, in units of 8192 x 4096 numbers: x for h and for dA, and dY once."""
    unit, mlp = 8192 * 4096 * 2, 3.5
    apart, sharing = decoder_layer(16, 0, shared=False), decoder_layer(16, 0)
    dys = 1 + 0.25 + 0.25 + 1 + mlp + mlp + 1
    assert apart["activations"] == unit * (2 * (3 + 1 + 2 + mlp) + dys)
    assert sharing["activations"] == unit * (2 * (1 + 1 + 1 + mlp) + dys) <= 1.60e9
    # q, k and v have two sums, gate and up one: two readings and a writing each, or one reading.
    assert (apart["sums"], sharing["sums"]) == (unit * 9, unit * 3)
    assert sharing["narrow"] < 1.1 * apart["narrow"]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("rank", "experts"), [(16, 0), (32, 8)])
def test_sharing_x_moves_less(plan, rank, experts):
    apart, sharing = decoder_layer(rank, experts, plan, shared=False), decoder_layer(rank, experts, plan)
    assert sum(sharing.values()) < sum(apart.values()) - 8 * 8192 * 4096 * 2
    assert sharing["base"] <= apart["base"]


def test_unknown_kernels_are_refused(monkeypatch):
    call = record(lambda: stages.dropout(torch.empty(4, 8, device="meta"), 0.5, 3), "sm_90")[0]
    monkeypatch.setattr(type(call.launch), "name", "unheard_of")
    with pytest.raises(ValueError, match="unheard_of has no count"):
        traffic._cost("x", call, H200)


def test_table(capsys):
    roofline.main(["--chip", "h200", "--tokens", "512"])
    out = capsys.readouterr().out
    assert "backward: project_reduce_fwd" in out or "backward: reduce_fwd" in out
    assert "of the floor's bytes" in " ".join(out.split())
    assert "sharing x" in out and "adding up dX" in out


def test_rows_floor_by_hand():
    """2 tokens, 3 to 5, two rows trained: W' = [W's 3 other rows, 2 trained ones], and two of dY's columns with x."""
    for dtype, adapter_dtype in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32)):
        forward, dx, dactive = row_floor(Shape(2, 3, 5, 0, 0, 0, 2), dtype, adapter_dtype)
        size, adapter = dtype.itemsize, adapter_dtype.itemsize
        merged = 3 * 3 * size + 2 * 3 * adapter
        assert forward.moved == dx.moved == 2 * 3 * size + merged + 2 * 5 * size
        assert forward.operations == dx.operations == 2 * 2 * 3 * 5
        assert dactive.moved == 2 * 2 * size + 2 * 3 * size + 2 * 3 * adapter and dactive.operations == 2 * 2 * 3 * 2


def test_floor_seconds():
    """Of a device whose rates are known; `bench` leaves its row out for others."""
    assert costs.floor_seconds(LORAMOE, torch.bfloat16, torch.bfloat16, torch.device("cpu")) is None


def test_floor_seconds_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    least = costs.floor_seconds(LORAMOE, torch.bfloat16, torch.bfloat16, torch.device("cuda"))
    assert least["gci"] == total_seconds(
        bottleneck_floor(LORAMOE, torch.bfloat16, torch.bfloat16), H200, torch.bfloat16
    )
    assert least["frozen"] < least["gci"]
    rows = Shape(8192, 4096, 4096, 0, 0, 0, 409)
    least = costs.floor_seconds(rows, torch.bfloat16, torch.bfloat16, torch.device("cuda"))
    assert least["gci"] == total_seconds(row_floor(rows, torch.bfloat16, torch.bfloat16), H200, torch.bfloat16)
    assert least["frozen"] < least["gci"]
