"""csrc/cuda without a GPU: how it is built or left out, and what the kernels use of a chip."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up, and build_cuda imports build_ninja
    spec.loader.exec_module(module)
    return module


build_ninja, build_cuda = load("build_ninja"), load("build_cuda")
PATH = {"PATH": os.environ["PATH"]}


@pytest.fixture(scope="module")
def toolkit():
    try:
        return build_cuda.find(os.environ)
    except build_cuda.Unavailable as reason:
        pytest.skip(f"nothing can be compiled for a GPU here: {reason}")


def fake_nvcc(folder: Path, version: str, script: str = "exit 1") -> dict[str, str]:
    """An environment whose nvcc only says its version, and otherwise does what `script` says."""
    program = folder / "bin" / "nvcc"
    program.parent.mkdir(parents=True)
    program.write_text(
        f'#!/bin/sh\nif [ "$1" = --version ]; then echo "release {version}, V{version}.1"; exit; fi\n{script}\n'
    )
    program.chmod(0o755)
    return {"CUDA_HOME": str(folder)}


# Whether it is built


def refused(capsys, environment: dict[str, str]) -> str:
    """The reason why CUDA is left out, which GCI_BUILD_CUDA=1 makes the error and 0 does not even look for."""
    plan = build_cuda.decide(environment)
    assert plan.toolkit is None and plan.description.startswith("not built: ") and "\n" not in plan.description
    reason = plan.description.removeprefix("not built: ")
    with pytest.raises(SystemExit) as end:
        build_cuda.decide(environment | {"GCI_BUILD_CUDA": "1"})
    assert f"cannot build its CUDA kernels: {reason}" in str(end.value)
    assert build_cuda.decide(environment | {"GCI_BUILD_CUDA": "0"}).description == "not built: GCI_BUILD_CUDA=0"
    return reason


def test_no_nvcc(capsys, monkeypatch, tmp_path):
    assert "there is no bin/nvcc in /nonexistent" in refused(capsys, {"CUDA_HOME": "/nonexistent"})
    assert "there is no bin/nvcc in /nonexistent" in refused(capsys, {"CUDA_PATH": "/nonexistent"})
    monkeypatch.setattr(build_cuda, "DEFAULT_FOLDER", tmp_path)
    assert refused(capsys, {"PATH": str(tmp_path)}).startswith("no nvcc: ")


@pytest.mark.parametrize("version", ("11.8", "12.3", "14.0"))
def test_nvcc_of_another_time(capsys, tmp_path, version):
    environment = fake_nvcc(tmp_path, version)
    assert refused(capsys, environment).endswith(f"nvcc is version {version}; 12.4 to 13.x fit")
    on_path = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}  # which comes before /usr/local/cuda
    assert refused(capsys, on_path).endswith(f"nvcc is version {version}; 12.4 to 13.x fit")


def test_nvcc_that_does_not_work(capsys, tmp_path):
    environment = fake_nvcc(tmp_path, "12.4", "echo 'error: unsupported GNU version' >&2; exit 1")
    assert refused(capsys, environment).endswith("has no cuda_runtime_api.h")
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime_api.h").touch()
    assert refused(capsys, environment).endswith("has no libcudart_static.a")
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64" / "libcudart_static.a").touch()
    assert refused(capsys, environment).endswith("cannot compile: error: unsupported GNU version")
    (tmp_path / "bin" / "nvcc").write_text("#!/bin/sh\necho broken >&2; exit 1\n")
    assert refused(capsys, environment).endswith("does not say its version: broken")


def test_what_was_asked_for_and_cannot_be():
    with pytest.raises(SystemExit, match="GCI_BUILD_CUDA=yes: allowed are 1"):
        build_cuda.decide({"GCI_BUILD_CUDA": "yes"})
    with pytest.raises(SystemExit, match="GCI_CUDA_ARCH_LIST=9.0a;7.5: '7.5' is none of 8.0, .*9.0a"):
        build_cuda.decide({"GCI_CUDA_ARCH_LIST": "9.0a;7.5"})


def test_which_architectures():
    parse, choose = build_cuda.parse, build_cuda.choose
    assert parse("") is parse("  ") is None and parse("all") == parse(" all ") == []
    assert parse("9.0a") == [("9.0a", False)]
    assert parse("8.0;9.0a+PTX") == parse("8.0, 9.0a+PTX") == parse("8.0 9.0a+PTX ") == [("8.0", False), ("9.0a", True)]
    for bad in ("sm_90", "9", "9.0b", "9.0a+ptx", "+PTX", "9.0a;;x", "90a", "All", "all;9.0"):
        with pytest.raises(SystemExit, match="GCI_CUDA_ARCH_LIST=.*is none of"):
            parse(bad)
    assert choose([], (13, 0)) == (("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "compute_100"), [])
    older = ("sm_80", "sm_86", "sm_89", "sm_90a", "compute_90"), ["sm_100 left out: it needs nvcc 12.8"]
    assert choose([], (12, 4)) == choose([], (12, 7)) == older
    assert choose(parse("8.0;9.0a+PTX;8.0"), (12, 4)) == (("sm_80", "sm_90a", "compute_90"), [])
    with pytest.raises(build_cuda.Unavailable, match="names 10.3, which needs nvcc 12.9"):
        choose(parse("8.0;10.3"), (12, 8))


def test_this_machines_gpus_are_what_is_built_for():
    choose, here = build_cuda.choose, ["for this machine's GPUs"]
    assert choose([], (13, 0), ("9.0",)) == (("sm_90a",), here)
    assert choose([], (13, 0), ("8.9", "12.0")) == (("sm_89", "sm_120"), here)
    assert choose([("8.0", False)], (13, 0), ("9.0",)) == (("sm_80",), []), "what is listed comes first"
    assert choose([], (13, 0), ("7.5", "8.6")) == (("sm_86",), here), "what is too old is left out"
    for version, gpu in (((12, 4), "12.0"), ((13, 0), "15.0")):
        targets, remarks = choose([], version, (gpu, "8.0"))
        assert (targets, remarks[1:]) == choose([], version), "the usual ones, whose PTX a newer GPU compiles"
        assert remarks[0] == f"this machine's GPU of capability {gpu} is newer than nvcc"
    with pytest.raises(build_cuda.Unavailable, match="has the capability 7.5; the kernels need 8.0"):
        choose([], (13, 0), ("7.5",))


def test_which_gpus_this_machine_has(tmp_path, toolkit):
    def machine(script: str) -> dict[str, str]:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        return os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "GCI_CUDA_ARCH_LIST": "", "GCI_BUILD_CUDA": ""}

    environment = machine('[ "$*" = "--query-gpu=compute_cap --format=csv,noheader" ] && echo 9.0 && echo 9.0')
    assert build_cuda.this_machine(environment) == ("9.0",)
    plan = build_cuda.decide(environment)
    assert plan.targets == ("sm_90a",) and plan.description.endswith("; for this machine's GPUs")
    usual = build_cuda.choose([], toolkit.version)[0]
    assert build_cuda.decide(environment | {"GCI_CUDA_ARCH_LIST": "all"}).targets == usual
    no_driver = machine("echo NVIDIA-SMI has failed because it couldn't communicate; exit 9")
    assert build_cuda.this_machine(no_driver) == () and build_cuda.decide(no_driver).targets == usual
    assert build_cuda.this_machine({"PATH": "/nonexistent"}) == ()


def test_plan_here(toolkit):
    plan = build_cuda.decide(os.environ | {"GCI_BUILD_CUDA": "1", "GCI_CUDA_ARCH_LIST": "9.0a"})
    version = ".".join(map(str, toolkit.version))
    assert (plan.toolkit, plan.targets, plan.description) == (toolkit, ("sm_90a",), f"sm_90a, by nvcc {version}")


def test_host_compiler_behind_a_launcher(toolkit):
    for cxx, host in (("ccache g++ -pipe", ["-ccbin", "g++"]), ("/usr/bin/g++", ["-ccbin", "/usr/bin/g++"]), ("", [])):
        command = build_cuda.command(toolkit, ("sm_90a",), {"CXX": cxx})
        assert command[1 : 1 + len(host)] == host and ("-ccbin" in command) == bool(host)


def test_a_build_that_demands_cuda_ends_with_one_message(tmp_path):
    command = [sys.executable, "setup.py", "-q", "build_ext", "-b", str(tmp_path), "-t", str(tmp_path)]
    environment = os.environ | {"GCI_BUILD_CUDA": "1", "CUDA_HOME": "/nonexistent"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert done.stderr.count("gci_kernels cannot build its CUDA kernels: there is no bin/nvcc in /nonexistent") == 1


def test_header_says_what_was_built_and_changes_only_with_it(tmp_path, monkeypatch):
    plan = build_cuda.Plan('not built: "quoted" \\ reason')
    header = build_cuda.write_header(plan, tmp_path)
    os.utime(header, (1, 1))
    build_cuda.write_header(plan, tmp_path)
    assert header.stat().st_mtime == 1
    assert header.read_text() == '#define GCI_CUDA_BUILD "not built: \\"quoted\\" \\\\ reason"\n'
    monkeypatch.chdir(ROOT)
    toolkit = build_cuda.Toolkit(Path("nvcc"), (12, 8), Path("include"), Path("runtime"))
    build_cuda.write_header(build_cuda.Plan("sm_80", toolkit), tmp_path)
    said = ['BUILD "sm_80"', 'COMPILER "nvcc 12.8"', f'DIGEST "{build_cuda.digest("nvcc 12.8")}"']
    assert header.read_text().splitlines() == [
        f"#define GCI_CUDA_{said[0]}", "#define GCI_HAS_CUDA 1", *(f"#define GCI_CUDA_{each}" for each in said[1:]),
    ]  # fmt: skip


def test_digest_is_of_all_that_is_compiled_and_by_what(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    monkeypatch.chdir(tmp_path)

    def digest(compiler: str = "nvcc 13.0") -> str:
        return build_cuda.digest(compiler)

    seen = [digest(), digest("nvcc 12.9")]
    (tmp_path / "csrc" / "bindings.cpp").write_text("// not compiled by nvcc")
    (tmp_path / "csrc" / "cpu" / "gate.cpp").write_text("// nor this")
    assert digest() == seen[0]
    for path in ("cuda/decode_attend.cu", "cuda/checks.cpp", "cuda/launch.h", "common/decode.h", "cuda/new.cuh"):
        with open(tmp_path / "csrc" / path, "a") as file:
            file.write("// changed\n")
        seen.append(digest())
    (tmp_path / "csrc" / "cuda" / "new.cuh").rename(tmp_path / "csrc" / "cuda" / "newer.cuh")
    seen.append(digest())
    monkeypatch.setattr(build_cuda, "FLAGS", [*build_cuda.FLAGS, "-use_fast_math"])
    seen.append(digest())
    assert len(set(seen)) == len(seen) == 9


def compiled(compiler: tuple[str, ...], suffix: str, folder: Path) -> dict[str, tuple[bytes, int]]:
    """Each object of a and c, and when it was made."""
    wanted = [build_ninja.Object(str(folder / f"{name}.o"), f"src/{name}.{suffix}", compiler) for name in "ac"]
    paths = build_ninja.compile_all(wanted, folder)
    assert paths == [made.path for made in wanted]
    return {path: (Path(path).read_bytes(), Path(path).stat().st_mtime_ns) for path in paths}


@pytest.mark.parametrize("suffix", ("cpp", "cu"))
def test_objects_follow_the_headers(tmp_path, monkeypatch, capfd, suffix, request):
    code = "__global__ void k(int* p) { *p = VALUE; }" if suffix == "cu" else "int k() { return VALUE; }"
    compiler = ("g++", "-O1", "-DNAME=a b$c")
    if suffix == "cu":
        toolkit = request.getfixturevalue("toolkit")
        compiler = tuple(build_cuda.command(toolkit, ("sm_90a",), {}))
    (tmp_path / "src").mkdir()
    for name in "ac":
        (tmp_path / "src" / f"{name}.{suffix}").write_text(f'#include "value.h"\n{code}\n')
    header = tmp_path / "src" / "value.h"
    header.write_text("#define VALUE 1\n")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "temporary objects"  # a space means something to ninja

    first = compiled(compiler, suffix, folder)
    assert compiled(compiler, suffix, folder) == first, "nothing was to be done"
    header.write_text("#define VALUE 2\n")
    second = compiled(compiler, suffix, folder)
    assert all(first[path][0] != second[path][0] for path in first)
    other = compiled((*compiler, "-DVALUE2"), suffix, folder)
    assert all(second[path][1] != other[path][1] for path in first), "other options make other objects"
    header.write_text("#error broken\n")
    capfd.readouterr()
    with pytest.raises(SystemExit, match="could not be compiled"):
        compiled(compiler, suffix, folder)
    assert "error broken" in "".join(capfd.readouterr())


def test_without_ninja_the_build_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ninja", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="pip install ninja"):
        build_ninja.compile_all([], tmp_path)


def test_sdist_holds_what_the_build_reads(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("csrc", "gci_kernels", "bench", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.split("/", 1)[1] for name in opened.getnames() if "/" in name}
    needed = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert (
        needed | {"setup.py", "build_cpu.py", "build_cuda.py", "build_ninja.py", "tests/cuda_on_cpu/fibers.cpp"}
        <= names
    )


# What the kernels use

KERNELS = {"decode_project": 15, "decode_expand": 15, "decode_attend": 5}  # variants by dtypes and tokens
# sm_90a in every run; the others take as long again each.
OTHERS = [pytest.param(target, marks=pytest.mark.slow) for target in ("sm_80", "sm_86", "sm_89", "sm_100", "sm_120")]


@pytest.mark.parametrize("target", ["sm_90a", *OTHERS])
def test_no_kernel_spills(toolkit, tmp_path, target):
    capability = f"{target[3:-1]}.{target[-1]}" if target[-1] != "a" else "9.0a"
    try:
        build_cuda.choose([(capability, False)], toolkit.version)
    except build_cuda.Unavailable as reason:
        pytest.skip(str(reason))
    for stem, variants in KERNELS.items():
        nvcc = build_cuda.command(toolkit, (target,), os.environ)
        command = [*nvcc, "-Xptxas", "-v", "-c", f"csrc/cuda/{stem}.cu", "-o", str(tmp_path / "made.o")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
        assert stacks == [("0", "0", "0")] * variants
        uses = re.findall(r"Used (\d+) registers.*", done.stderr)
        shared = [int(size) for size in re.findall(r"(\d+) bytes smem", done.stderr)]
        assert len(uses) == variants and "lmem" not in done.stderr
        threads = 512 if stem == "decode_attend" else 256
        assert all(int(registers) * threads <= 65536 for registers in uses) and all(size <= 48 << 10 for size in shared)
        print("\n".join(re.findall(r"entry function .*|Used .*", done.stderr)))
