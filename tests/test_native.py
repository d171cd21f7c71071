"""The C++ stages against library products, on every instruction set of this processor; loading the extension."""

import itertools
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from gci_kernels import limits, native
from gci_kernels.accuracy import error_bound, relative_error
from gci_kernels.ops.bottleneck import choose_plan
from gci_kernels.ops.bottleneck import native as stages
from gci_kernels.ops.bottleneck.plan import Plan
from gci_kernels.proof.info import openmp_runtimes

pytestmark = pytest.mark.usefixtures("poisoned")

# tokens, the long side, the skinny side: below, at and above a tile, a vector and a cache block
SHAPES = [
    (1, 1, 1), (1, 2048, 40), (7, 33, 3), (8, 16, 16), (9, 17, 17), (130, 67, 48), (65, 1100, 49), (64, 512, 100),
    (200, 513, 8), (50, 300, 20), (601, 70, 40), (0, 20, 4),
]  # fmt: skip


PRODUCT_DTYPES = (torch.float32, torch.bfloat16) if native.extension().has_bf16_products() else (torch.float32,)


def check(actual, left, right):
    """`actual` holds float32 sums, whatever the operands: no worse than the library's product of the same numbers."""
    truth, plain = left.double() @ right.double(), left.float() @ right.float()
    assert actual.shape == truth.shape and actual.dtype == torch.float32
    assert relative_error(actual, truth) <= error_bound(relative_error(plain, truth), torch.float32)


@pytest.mark.parametrize(("tokens", "long", "skinny"), SHAPES)
@pytest.mark.parametrize("threads", (1, 2, 5))
@pytest.mark.parametrize("dtype", PRODUCT_DTYPES)
def test_products(tokens, long, skinny, threads, dtype):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        wide = torch.randn(tokens, long + 3, dtype=dtype)
        x, m = wide[:, 3:], torch.randn(skinny, long).t()  # rows with a gap, and a transposed float32 view
        rounded = m.to(dtype)
        check(stages.project(x, m), x, rounded)
        check(stages.project(x, rounded.contiguous()), x, rounded)
        u = torch.randn(tokens, skinny + 2, dtype=dtype)[:, :skinny]
        check(stages.reduce(u, x), u.t(), x)
        if dtype == torch.bfloat16:
            w = torch.randn(long, long + 1, dtype=dtype)[:, 1:]
            y = stages.expand(u, m.t(), x, w, None)
            terms = [(u.double(), rounded.t().double()), (x.double(), w.double())]
            expected, size = sum(a @ b for a, b in terms), sum(a.abs() @ b.abs() for a, b in terms)
            # The base product is rounded and then the sum; where the two cancel, the first rounding stays.
            assert ((y - expected).abs() <= torch.finfo(dtype).eps * size).all()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", PRODUCT_DTYPES)
def test_long_sums_round_no_more_than_the_library(dtype):
    """14,336 products a sum, as in the widest layer of an 8B model; all of one sign, where running sums lose most."""
    x, m = torch.rand(16, 14336).to(dtype), torch.rand(14336, 40).to(dtype)
    check(stages.project(x, m), x, m)
    u = torch.rand(14336, 8).to(dtype)
    check(stages.reduce(u, m), u.t(), m)


@pytest.mark.parametrize("dtype", PRODUCT_DTYPES)
def test_neighbouring_memory_is_not_read_into_the_result(dtype):
    """Odd sizes inside a tensor of NaN: what lies beside a row must not leak in, not even multiplied by zero."""
    x = torch.full((9, 40), float("nan"), dtype=dtype)
    x[:, :35] = 1
    view, m = x[:, :35], torch.ones(35, 3)
    assert (stages.project(view, m) == 35).all()
    assert (stages.reduce(torch.ones(9, 3, dtype=dtype), view) == 9).all()
    if dtype == torch.bfloat16:
        y = stages.expand(
            view[:, :7], torch.ones(7, 33), torch.ones(9, 1, dtype=dtype), torch.ones(1, 33, dtype=dtype), None
        )
        assert (y == 8).all()


@pytest.mark.parametrize("dtype", PRODUCT_DTYPES)
def test_operands_that_do_not_fit_each_other_are_refused(dtype):
    """A kernel knows addresses alone: it would read past the end of the smaller one."""
    x = torch.ones(9, 35, dtype=dtype)
    calls = [lambda: stages.project(x, torch.ones(34, 3)), lambda: stages.reduce(torch.ones(8, 3, dtype=dtype), x)]
    if dtype == torch.bfloat16:
        w = torch.ones(35, 33, dtype=dtype)
        for u, m in (((9, 4), (5, 33)), ((9, 4), (4, 32)), ((8, 4), (4, 33))):
            calls.append(partial(stages.expand, torch.ones(u, dtype=dtype), torch.ones(m), x, w, None))
    for call in calls:
        with pytest.raises(ValueError, match="the operands of a product do not fit each other"):
            call()


def test_empty_sum():
    assert stages.project(torch.empty(3, 0), torch.empty(0, 4)).abs().sum() == 0


def test_same_bits_twice_and_for_any_schedule():
    u, y = torch.randn(1000, 40), torch.randn(1000, 300)
    first = stages.reduce(u, y)
    for _ in range(5):
        assert torch.equal(first, stages.reduce(u, y))


def test_same_bits_for_any_number_of_threads():
    x, m, u = torch.randn(1000, 300), torch.randn(300, 40), torch.randn(1000, 40)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append((stages.project(x, m), stages.reduce(u, x)))
    finally:
        torch.set_num_threads(before)
    for projected, reduced in results[1:]:
        assert torch.equal(projected, results[0][0]) and torch.equal(reduced, results[0][1])


@pytest.mark.smoke
def test_one_openmp_runtime():
    """The extension shares torch's pool of threads: a second one would fight it for the cores."""
    stages.project(torch.randn(64, 64), torch.randn(64, 8))
    assert len(openmp_runtimes()) == 1, openmp_runtimes()


def _runs(isa: str, folder: Path, *command: str) -> subprocess.CompletedProcess:
    """Runs Python in an empty folder, where the installed package is found and not the source tree."""
    environment = os.environ | {"GCI_CPU_ISA": isa}
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)


# What this processor has beside its best one.
LESSER = native.ISAS[: native.ISAS.index(native.ISA)]


@pytest.mark.parametrize("isa", LESSER)
def test_lesser_instruction_sets(isa, tmp_path):
    done = _runs(isa, tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not instruction_set", __file__)
    assert done.returncode == 0, done.stdout[-3000:]


def test_unknown_instruction_set_is_named(tmp_path):
    done = _runs("mmx", tmp_path, "-c", "import gci_kernels")
    assert (
        done.returncode != 0 and "GCI_CPU_ISA=mmx: this build or processor has no such instruction set" in done.stderr
    )
    assert f"allowed: {', '.join((*LESSER, native.ISA))}" in done.stderr


def test_every_instruction_set_gains_what_the_one_before_it_does():
    """Its row in the plan's tables is not forgotten."""
    for lower, higher in itertools.pairwise(native.ISAS):
        for dtype, tokens in itertools.product((torch.float32, torch.bfloat16), (1, 64, 2048)):
            lesser, better = (
                choose_plan("auto", tokens=tokens, dtype=dtype, device_type="cpu", isa=isa, library=True)
                for isa in (lower, higher)
            )
            for stage, impl in lesser._asdict().items():
                assert impl != "native" or getattr(better, stage) == "native", (lower, higher, dtype, tokens, stage)


@pytest.mark.smoke
def test_plan_is_pure_and_printable():
    def plan(dtype, tokens=2048, device_type="cpu", isa="avx512bf16", impl="auto"):
        """Where the library multiplies every dtype; tests/test_upcast.py has the other processors."""
        return choose_plan(
            impl, tokens=tokens, dtype=dtype, device_type=device_type, mixer="gate", isa=isa, library=True
        )

    whole = plan(torch.float32, isa="avx512")
    assert whole == Plan("native", "native", "aten", "native", "native") == Plan.from_key(whole.key)
    assert str(whole) == "project=native mix=native expand=aten reduce=native dropout=native"
    assert plan(torch.float32, isa="avx2") == whole
    assert plan(torch.float32, tokens=1).key == "aten/native/aten/aten/native"
    assert plan(torch.float32, tokens=64).key == "aten/native/aten/native/native"
    assert plan(torch.float32, isa="baseline").key == "aten/native/aten/aten/native"
    assert plan(torch.bfloat16).key == plan(torch.bfloat16, isa="amx").key == "native/native/aten/native/native"
    assert plan(torch.float32, isa="amx") == whole
    assert plan(torch.bfloat16, tokens=1).expand == "native"
    assert plan(torch.bfloat16, isa="avx512").key == "upcast/native/upcast/upcast/native"
    assert plan(torch.bfloat16, isa="avx512", tokens=8).key == "aten/native/aten/aten/native"
    assert plan(torch.float32, tokens=1, isa="baseline", impl="native") == whole
    assert plan(torch.bfloat16, impl="native").key == "native/native/native/native/native"
    assert plan(torch.float64, impl="native").key == "aten/native/aten/aten/native"
    assert plan(torch.bfloat16, device_type="cuda").key == plan(torch.float16).key == "aten/aten/aten/aten/aten"
    with pytest.raises(ValueError, match="impl='native' cannot run here: its kernels run on CPU tensors, not cuda"):
        plan(torch.float32, device_type="cuda", impl="native")


def test_limits_are_the_same_in_cpp():
    """native.py compares them with the extension; here with the sources, which may be newer."""
    header = (Path(__file__).resolve().parents[1] / "csrc" / "common" / "limits.h").read_text()
    values = {name.lower(): value for name, value in vars(limits).items() if name.isupper()}
    assert {name: int(value) for name, value in re.findall(r"LIMIT\((\w+), (\d+)\)", header)} == values


def test_an_extension_with_other_limits_is_not_loaded(monkeypatch):
    monkeypatch.setattr(limits, "MAX_EXPERTS", 255)
    with pytest.raises(ImportError, match="built from other sources: its limits are not those of limits.py"):
        native._load()


def test_without_the_extension(monkeypatch):
    monkeypatch.setattr(native, "_extension", None)
    monkeypatch.setattr(native, "_failure", ImportError("no such file"))
    assert choose_plan("auto", tokens=9, dtype=torch.float32, device_type="cpu").mix == "aten"
    with pytest.raises(ValueError, match="no such file"):
        choose_plan("native", tokens=9, dtype=torch.float32, device_type="cpu")
    with pytest.raises(ImportError, match="C\\+\\+17 compiler"):
        native.extension()
