"""The CUDA C++ kernels of a decoding step (csrc/cuda) against float64; test_cuda_on_cpu.py runs this without a GPU.

A test proves the kernel decode_step where no mark of its own says decode_attend.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_decode_cases import BF16, DEVICE, DTYPES, F32, check, make_group, name, only_gpu, plain, randn, step
from gpu_params import kernel_params

from gci_kernels import hardware
from gci_kernels.accuracy import relative_error
from gci_kernels.hardware import self_check
from gci_kernels.ops.decode import cuda
from gci_kernels.ops.decode.cuda import Step

pytestmark = [pytest.mark.gpu, pytest.mark.kernel("decode_step"), pytest.mark.usefixtures("poisoned", "kernels")]
attends = pytest.mark.kernel("decode_attend")
ATTEND = str(Path(__file__).with_name("test_gpu_decode_attend.py"))


# in, out, rank, experts, top_k: aligned, odd in every direction, more than a lane loads early, one of each, the largest
SIZES = [
    (512, 256, 16, 0, None), (1000, 72, 4, 8, None), (515, 131, 3, 5, 2), (264, 65, 24, 4, 3), (8, 1, 1, 1, None),
    (1, 7, 2, 0, None), (80, 70, 512, 0, None), (90, 66, 1, 256, 17), (776, 130, 14, 33, 32),
]  # fmt: skip


@pytest.mark.parametrize("dtypes", DTYPES, ids=name)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_step_of_one_group(sizes, dtypes):
    for tokens in (1, 3, 16) if sizes[2] < 100 else (2,):
        x, y = randn(tokens, sizes[0], dtype=dtypes[0]), randn(tokens, sizes[1], dtype=dtypes[0])
        check(x, y, [make_group(dtypes[1], sizes, 0, tokens)], list(range(tokens)))


@pytest.mark.parametrize("dtypes", DTYPES, ids=name)
@pytest.mark.parametrize("gap", (0, 3, 8))
@pytest.mark.parametrize("offset", (0, 1))
def test_step_of_several_adapters_in_rows_of_any_order(dtypes, gap, offset):
    inside, out = 520, 136
    x, y = (randn(20, size, dtype=dtypes[0], gap=gap, offset=offset) for size in (inside, out))
    kinds = [((8, 4, None), 0, 3), ((6, 0, None), 3, 1), ((4, 8, 2), 6, 5), ((1, 0, None), 11, 2)]
    groups = [make_group(dtypes[1], (inside, out, *kind), first, count) for kind, first, count in kinds]
    check(x, y, groups, [19, 3, 0, 7, 5, 6, 8, 1, 2, 9, 10, 18, 4])  # those of tokens 4 and 5 have no adapter


@pytest.mark.parametrize("top_k", (None, 2))
@pytest.mark.parametrize("where", ("logit 0", "logit 3", "value 1"))
def test_nan_stays_where_it_is(where, top_k):
    group = make_group(F32, (64, 40, 2, 4, top_k), 0, 2)
    what, index = where.split()
    {"logit": group.router, "value": group.A}[what][int(index), 5] = float("nan")
    x, y = randn(2, 64), randn(2, 40)
    assert step(x, y, [group], [0, 1]).isnan().all()
    x[0, 5] = 1
    group.A.nan_to_num_(0), group.router.nan_to_num_(0)
    x[1, 5] = float("nan")
    actual = step(x, y, [group], [0, 1])
    assert actual[1].isnan().all() and not actual[0].isnan().any()


def test_ties_go_to_the_lower_expert():
    experts, x = 40, torch.ones(1, 16, device=DEVICE)
    for top_k in (1, 2, 7, 39, 40):
        group = make_group(F32, (16, experts, 1, experts, top_k), 0, 1)
        group.router.copy_(torch.randint(-1, 2, (experts, 1), device=DEVICE).expand(experts, 16))
        group.A.fill_(1 / 16), group.B.copy_(torch.eye(experts))
        y = torch.zeros(1, experts, device=DEVICE)
        wanted = plain(x, y, [group], [0], torch.float64)
        actual = step(x, y, [group], [0])
        assert torch.equal(actual != 0, wanted != 0) and relative_error(actual, wanted) < 1e-6


@pytest.mark.parametrize("dtype", self_check.DTYPES, ids=name)
@pytest.mark.parametrize("kernel", kernel_params(hardware.names("cuda")))
def test_self_check(kernel, dtype):
    checks = list(self_check.check_kernel(kernel, torch.device(DEVICE), dtypes=(dtype,)))
    assert len(checks) >= 16 and not [check for check in checks if not check.passed]


FAULTS = {
    "decode_step": [
        ("project", lambda right: lambda step, x: right(step, x) * 1.01),
        ("project", lambda right: lambda step, x: right(step, x).half().float()),
        ("expand", lambda right: lambda step, y, partial: right(step, y, partial.roll(1, 1))),
        ("expand", lambda right: lambda step, y, partial: [right(step, y, partial) for _ in range(2)]),
    ],
    "decode_attend": [
        ("attend", lambda right: lambda step, x, kv, past, segments: right(step, x, kv, past, None)),
        ("attend", lambda right: lambda step, x, kv, past, segments: right(step, x, kv, past - 1, segments)),
        ("attend", lambda right: lambda step, x, kv, past, segments: right(step, x.roll(1, 0), kv, past, segments)),
        ("expand", lambda right: lambda step, y, partial: right(step, y.clone(), partial)),
    ],
}  # fmt: skip


@pytest.mark.parametrize("fault", range(4))
@pytest.mark.parametrize("kernel", kernel_params(FAULTS))
def test_self_check_stops_wrong_kernels(monkeypatch, kernel, fault):
    where, wrong = FAULTS[kernel][fault]
    monkeypatch.setattr(cuda, where, wrong(getattr(cuda, where)))
    device = torch.device(DEVICE)
    for dtype in (F32, BF16) if (kernel, fault) != ("decode_step", 1) else (F32,):
        checks = self_check.check_kernel(kernel, device, dtypes=(dtype,), shapes=(self_check.ODD,))
        assert not all(check.passed for check in checks)


# What only a GPU shows


@only_gpu
@pytest.mark.parametrize("kernel", kernel_params(hardware.names("cuda")))
def test_self_check_proves(kernel, monkeypatch, tmp_path):
    monkeypatch.setenv("GCI_CACHE", str(tmp_path))
    device = torch.device("cuda", torch.cuda.current_device())
    with torch.autocast("cuda", torch.bfloat16), torch.inference_mode():
        record = hardware.renew(kernel, device)
    assert record.passed, record.reason
    assert hardware.find(kernel, device).source == str(hardware.own_path()) and hardware.proves(kernel, torch.bfloat16)


@only_gpu
@pytest.mark.parametrize("dtypes", DTYPES, ids=name)
def test_step_in_a_graph(dtypes):
    x, y = randn(4, 1024, dtype=dtypes[0]), torch.zeros(4, 512, dtype=dtypes[0], device=DEVICE)
    kinds = [((4, 8, None), 0, 3), ((16, 0, None), 3, 1)]
    groups = [make_group(dtypes[1], (1024, 512, *kind), first, count) for kind, first, count in kinds]
    step = Step(groups, [0, 1, 2, 3], dtypes[0])

    def whole():
        y.zero_()
        step.add(y, x)

    whole()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        whole()
    for _ in range(50):
        x.copy_(torch.randn_like(x))
        graph.replay()
        by_graph = y.clone()
        whole()
        assert torch.equal(by_graph, y)


@only_gpu
@pytest.mark.parametrize("tool", ("memcheck", "racecheck", "synccheck"))
@pytest.mark.parametrize("some", [
    "one_group and 131", "step and several", pytest.param("attend and several", marks=attends),
    pytest.param("test_attend and 67", marks=attends),
])  # fmt: skip
def test_sanitizer(tool, some):
    beside = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "compute-sanitizer")
    program = shutil.which("compute-sanitizer") or (str(beside) if beside.exists() else None)
    if program is None:
        pytest.skip("there is no compute-sanitizer")
    chosen = ["-m", "gpu", "-k", f"{some} and bfloat16-float32 and not sanitizer", __file__, ATTEND]
    command = [program, "--tool", tool, "--error-exitcode", "77", "--kernel-name", "kns=decode_"]
    command += [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *chosen]
    # Tensors are not cut from one large block then, whose neighbours the tool could not tell from them.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and " passed" in done.stdout, (done.stdout + done.stderr)[-3000:]
