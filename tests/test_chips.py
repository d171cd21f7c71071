"""The table of GPUs: which entry stands for a GPU that is listed, and for one that is not."""

import math

import pytest

from gci_kernels.hardware.chips import CAPABILITIES, CHIPS, SMALL, chip_of_capability, chip_of_device

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        *((capability, next(n for n, c in CHIPS.items() if c.capability == capability)) for capability in CAPABILITIES),
        ("sm_90a", "h100"),
        ("sm_87", "a10"),
        ("sm_101", "b200"),
        ("sm_110", "b300"),
        ("sm_130", "gb10"),
    ],
)
def test_an_unlisted_capability_has_the_limits_of_the_nearest_lower_one(capability, name):
    assert chip_of_capability(capability) is CHIPS[name]


@pytest.mark.parametrize("capability", ("sm_75", "gfx1100", "gfx90a", ""))
def test_a_capability_below_all_and_other_makers_count_as_small(capability):
    assert chip_of_capability(capability) is SMALL


@pytest.mark.parametrize(
    ("device_name", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA GeForce RTX 3090", "rtx-3090"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA B300 SXM6 AC", "b300"),
        ("NVIDIA GB300", "gb300"),
        ("NVIDIA GeForce RTX 5090", "rtx-5090"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtx-pro-6000"),
        ("NVIDIA GB10", "gb10"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_the_drivers_name(device_name, name):
    assert chip_of_device(device_name) is CHIPS[name]


@pytest.mark.parametrize(
    "device_name",
    [
        "NVIDIA A100-SXM4-40GB", "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H200 MIG 1g.18gb", "NVIDIA A10G",
        "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 5090 D",
        "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "NVIDIA RTX 6000 Ada Generation", "Tesla T4",
    ],
)  # fmt: skip
def test_no_rates_for_another_product_of_a_similar_name(device_name):
    assert chip_of_device(device_name) is None


def test_every_entry_is_complete_and_one_capability_has_one_set_of_limits():
    for chip in CHIPS.values():
        listed = chip_of_capability(chip.capability)
        limits = ("shared", "processor_shared", "registers", "warps", "async_products", "target")
        assert [getattr(chip, limit) for limit in limits] == [getattr(listed, limit) for limit in limits]
        assert 0 < SMALL.shared <= chip.shared <= chip.processor_shared
        assert all(math.isfinite(rate) and rate > 0 for rate in (chip.bandwidth, chip.half, chip.single))
    assert CHIPS["rtx-4090"].target == ("cuda", 89, 32) and CHIPS["mi300x"].target == ("hip", "gfx942", 64)
