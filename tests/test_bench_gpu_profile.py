"""`python -m bench.gpu --profile`: what the tools find is in the result, and so is that one is missing."""

import csv
import io
import json
import os
import stat
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from rich.console import Console

from gci_kernels import hardware
from gci_kernels.bench import gpu, gpu_cases, gpu_profile, gpu_report, machine

pytestmark = pytest.mark.usefixtures("one_thread")


def as_ncu(*rows: tuple[str, ...]) -> str:
    """As ncu writes it: lines about its work, then every row with all its cells in quotes."""
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows(rows)
    return '==PROF== Connected to process 41\n==PROF== Profiling "_expand_kernel": 19 passes\n' + text.getvalue()


RANGE = "thread Domain:Push/Pop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg"
#: The table's names, its units, a row for each launch.
COUNTERS = as_ncu(
    ("ID", "Kernel Name", "Block Size", RANGE, "dram__bytes_read.sum", "gpu__time_duration.sum", "smsp__note"),
    ("", "", "", "", "byte", "ns", ""),
    ("0", "_expand_kernel", "(128, 1, 1)", '"<default domain>:gci=triton;:none:none"', "100,663,296", "412,064", "n/a"),
    ("1", "gemm, 2", "(384, 1, 1)", '"<default domain>:gci=adapter first;:none:none"', "134,217,728", "398,112", "n/a"),
)


@pytest.fixture
def a_run(tmp_path, monkeypatch) -> gpu.Run:
    """A run on a GPU that nothing can run on; its processes do nothing."""
    monkeypatch.setenv("GCI_COMMIT", "x")
    options = ["--device", "cpu", "--quick", "--out", str(tmp_path / "out")]
    run = gpu.Run(gpu.parse(options), gpu_profile.SECONDS, tuple(gpu_profile.TOOLS), "-profile")
    run.device = torch.device("cuda")
    monkeypatch.setattr(run, "child", lambda *options: [sys.executable, "-c", "", *options])
    return run


def a_tool(run: gpu.Run, folder: Path, name: str, lines: str) -> None:
    """Put a program in the tool's place; `lines` of Python know its options, and the command that it is to run."""
    program = folder / name
    program.write_text(f"#!{sys.executable}\nimport sys, pathlib\noptions = sys.argv[1:]\n{textwrap.dedent(lines)}")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    run.result["tools"][name] = str(program)


def read(run: gpu.Run) -> dict:
    return json.loads(run.path.read_text())


def test_counters_are_read():
    first, second = gpu_profile.read_counters(COUNTERS)
    assert first["kernel"] == "_expand_kernel" and first["by"] == "triton"
    assert first["metrics"] == {"dram__bytes_read.sum": 100663296.0, "gpu__time_duration.sum": 412064.0}
    assert second["by"] == "adapter first" and second["kernel"] == "gemm, 2"
    assert gpu_profile.read_counters("==ERROR== nothing was profiled\n") == []


def test_every_product_is_looked_at(a_run, tmp_path):
    a_tool(
        a_run,
        tmp_path,
        "ncu",
        f"""
        assert options[options.index("--clock-control") + 1] == "none"
        assert options[options.index("--profile-from-start") + 1] == "off"
        pathlib.Path(options[options.index("--log-file") + 1]).write_text({COUNTERS!r})
    """,
    )
    a_run.step("counters", lambda limit: gpu_profile.counters(a_run, limit))
    entries = read(a_run)["counters"]
    assert [entry["name"] for entry in entries] == [f"{method} {stage}" for method, stage in gpu_profile.PRODUCTS]
    assert all(len(entry["kernels"]) == 2 for entry in entries) and read(a_run)["errors"] == {}
    console = Console(file=open(os.devnull, "w"), record=True, width=150)
    gpu_report.show(a_run.result, console)
    shown = console.export_text()
    assert "adapter first" in shown and "412.1" in shown and "134.2" in shown


def test_what_ncu_refuses_is_reported(a_run, tmp_path):
    a_tool(a_run, tmp_path, "ncu", "sys.exit('==ERROR== ERR_NVGPUCTRPERM')")
    a_run.step("counters", lambda limit: gpu_profile.counters(a_run, limit))
    assert "ERR_NVGPUCTRPERM" in read(a_run)["errors"]["counters"]
    a_tool(a_run, tmp_path, "ncu", "")
    with pytest.raises(RuntimeError, match="ncu ended well and wrote no counters"):
        gpu_profile.counters(a_run, 60.0)


def test_memcheck_names_the_kernel(a_run, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "missing", lambda name: "not built" if name == "decode_step" else "")
    a_tool(
        a_run,
        tmp_path,
        "compute-sanitizer",
        """
        import os
        assert options[:2] == ["--tool", "memcheck"] and os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        if options[-1] == "gate":
            print("========= Invalid __global__ read of size 2 bytes")
            sys.exit(int(options[options.index("--error-exitcode") + 1]))
    """,
    )
    a_run.step("memcheck", lambda limit: gpu_profile.memcheck(a_run, limit))
    result = read(a_run)
    wrong = [entry for entry in result["memcheck"] if "error" in entry]
    assert {entry["kernel"] for entry in result["memcheck"]} == set(hardware.KERNELS) - {"decode_step"}
    assert [entry["kernel"] for entry in wrong] == ["gate"] and result["left_out"]["decode_step"] == "not built"
    assert wrong[0]["error"].startswith("memcheck found errors: ") and "Invalid __global__ read" in wrong[0]["error"]


@pytest.mark.parametrize(("step", "tool"), gpu_profile.TOOLS.items())
def test_a_missing_tool_is_named(a_run, step, tool):
    a_run.result["tools"][tool] = None
    a_run.step(step, lambda limit: getattr(gpu_profile, step)(a_run, limit))
    assert read(a_run)["errors"][step].startswith(f"RuntimeError: {tool} is not here: neither in PATH")


def test_tools_are_found(monkeypatch, tmp_path):
    program = tmp_path / "bin" / "ncu"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setattr(machine, "_TOOL_FOLDERS", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert machine.find_tool("ncu") is None
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert machine.find_tool("ncu") == str(program)
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setattr(machine, "_TOOL_FOLDERS", (f"{tmp_path}/b*",))
    assert machine.find_tool("ncu") == str(program)


def test_every_product_is_a_stage():
    for method, stage in gpu_profile.PRODUCTS:
        runs = dict(gpu_profile._implementations(method, stage, gpu_cases.QUICK, torch.device("cpu")))
        assert "aten" in runs, (method, stage)
    with pytest.raises(ValueError, match="lora has no stage 'sideways'"):
        gpu_profile.product("lora", "sideways", gpu_cases.QUICK, torch.device("cpu"))
