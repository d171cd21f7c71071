"""Fixtures shared by several files."""

import contextlib
import importlib.util
import os
from pathlib import Path

# Processes side by side share the cores: one thread each, and for what they start. OpenMP and MKL read it once.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

import pytest  # noqa: E402
import torch  # noqa: E402

import gci_kernels  # noqa: E402
from gci_kernels import native  # noqa: E402
from gci_kernels.hardware import proving, records, timing  # noqa: E402
from gci_kernels.ops.decode import cuda  # noqa: E402
from gci_kernels.tuners import ALoRALinear, FusedLoraLinear, LoRAMoELinear, fusion  # noqa: E402

# CI tries the same examples every time; a developer's runs look for new ones. The tests that need a GPU do without.
if importlib.util.find_spec("hypothesis"):
    import hypothesis

    hypothesis.settings.register_profile("ci", derandomize=True)
    if "CI" in os.environ:
        hypothesis.settings.load_profile("ci")

# bench/gpu.py tests a checkout in which nothing is installed: bench/ lies beside the package there, not in it.
if importlib.util.find_spec("gci_kernels.bench") is None:
    gci_kernels.__path__.append(str(Path(__file__).parents[1]))
from toy_gpu import TIMES, forget  # noqa: E402

from gci_kernels.bench import gpu_proof  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--kernel", metavar="NAME", help="of the tests marked gpu only those marked kernel(NAME)")


def pytest_collection_modifyitems(config, items):
    """Every test marked gpu says which kernel, or which group of bench/gpu_proof.py, it decides about."""
    groups, chosen = gpu_proof.groups(), config.getoption("--kernel")
    if chosen not in (None, *groups):
        raise pytest.UsageError(f"--kernel {chosen}: allowed: {', '.join(groups)}")
    kept, left_out = [], []
    for item in items:
        name = None
        if item.get_closest_marker("gpu"):
            marker = item.get_closest_marker("kernel")
            name = marker.args[0] if marker else None
            if name not in groups:
                raise pytest.UsageError(f"{item.nodeid}: marked kernel({name}), allowed: {', '.join(groups)}")
        (kept if chosen in (None, name) else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


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
def threads():
    """torch.set_num_threads, undone."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(threads):
    """Tiny models gain nothing from more threads, and wait for them where the machine is busy."""
    threads(1)


@pytest.fixture
def kept_copies(monkeypatch):
    """As where the processor multiplies bfloat16: LoKI then keeps a copy of W, which float32 products do without."""
    monkeypatch.setattr("gci_kernels.ops.row_linear.plan.upcast_from", lambda *_: None)


@pytest.fixture
def imagined_gpu(monkeypatch, tmp_path):
    """A GPU that nothing can run on, an empty cache folder, no shipped records, and a fresh process's memory."""
    monkeypatch.setenv("GCI_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GCI_SELF_CHECK", raising=False)
    monkeypatch.setattr(records, "gpu", lambda device: ("Imagined 1000", "sm_90"))
    monkeypatch.setattr(proving, "_current_index", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(proving, "_capturing", lambda: False)
    monkeypatch.setattr(records, "shipped_folder", lambda: tmp_path / "proved")
    for name, value in (("CUDA_DIGEST", "of csrc"), ("CUDA_COMPILER", "nvcc 13.0"), ("CUDA_BUILD", "all of it")):
        monkeypatch.setattr(native, name, value)
    forget()
    yield
    forget()


@pytest.fixture
def self_checks(monkeypatch) -> list[str]:
    """The kernels whose self check was run; "expand" fails it and all others pass, with the times TIMES."""
    asked: list[str] = []

    def check(kernel, device, dtypes, dropouts):
        asked.append(kernel)
        return (False, "it is wrong", True) if kernel == "expand" else (True, "", True)

    monkeypatch.setattr(proving, "_self_check", check)
    monkeypatch.setattr(timing, "measure", lambda kernel, dtype, device: TIMES)
    return asked


@pytest.fixture(scope="session")
def kernels():
    """The CUDA kernels; with GCI_CUDA_ON_CPU the module of tests/cuda_on_cpu in place of the extension, and given."""
    on_cpu = os.environ.get("GCI_CUDA_ON_CPU")
    if on_cpu is None:
        if not native.available() or not native.extension().has_cuda:
            pytest.skip(f"no CUDA kernels: {native.why_unavailable() or native.CUDA_BUILD}")
        yield None
        return
    spec = importlib.util.spec_from_file_location("cuda_on_cpu", on_cpu)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "extension", lambda: module)
        patch.setattr(cuda, "index_of", lambda t: 0)
        patch.setattr(cuda, "is_current", lambda index: True)
        patch.setattr(cuda, "stream_of", lambda index: 0)
        yield module


@pytest.fixture
def steps(monkeypatch):
    """Whether a kernel took a layer's step, each time that it was asked."""
    answers = []

    def record(cls):
        own = cls._step

        def step(*args):
            result = own(*args)
            answers.append(result is not None)
            return result

        monkeypatch.setattr(cls, "_step", step)

    for cls in (FusedLoraLinear, LoRAMoELinear, ALoRALinear):
        record(cls)
    return answers


@pytest.fixture
def without(monkeypatch):
    """Takes the kernels for steps away."""
    return lambda: monkeypatch.setattr(fusion, "takes_steps", lambda impl, x: False)
