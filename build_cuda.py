"""What setup.py needs to compile csrc/cuda: finds nvcc, and chooses the GPUs to compile for. No GPU is needed.

GCI_BUILD_CUDA=1 demands the CUDA kernels, 0 leaves them out; unset, they are built where a supported nvcc is found.
They are built for the GPUs of this machine, or for the usual ones where it has none, as when an image is built.
GCI_CUDA_ARCH_LIST names others, such as "9.0a" or "8.0;10.0+PTX", or the usual ones by "all"; +PTX adds code that newer
GPUs can compile.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from build_ninja import Object, probe, run, write_if_changed

SOURCES = [f"csrc/cuda/decode_{name}.cu" for name in ("expand", "attend", "project")]  # the longest first
HOST_SOURCES = ["csrc/cuda/checks.cpp", "csrc/cuda/launch.cpp"]
FLAGS = ["-std=c++17", "-O3", "-Icsrc", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
OLDEST, NEWEST = (12, 4), (13, 99)
#: What GCI_CUDA_ARCH_LIST may name, and the first nvcc that knows it.
ARCHITECTURES = {
    "8.0": OLDEST, "8.6": OLDEST, "8.7": OLDEST, "8.9": OLDEST, "9.0": OLDEST, "9.0a": OLDEST, "10.0": (12, 8),
    "10.0a": (12, 8), "10.3": (12, 9), "10.3a": (12, 9), "12.0": (12, 8), "12.0a": (12, 8), "12.1": (12, 9),
}  # fmt: skip
USUAL = ("8.0", "8.6", "8.9", "9.0a", "10.0")
#: What is built for a GPU of a capability, where that is not the capability itself.
SPECIFIC = {"9.0": "9.0a"}
DEFAULT_FOLDER = Path("/usr/local/cuda")
LAUNCHERS = ("ccache", "sccache", "distcc")  # that may precede the compiler in CXX


class Unavailable(Exception):
    """CUDA cannot be built here; the message says why."""


@dataclass(frozen=True)
class Toolkit:
    """nvcc with its headers and its runtime library."""

    nvcc: Path
    version: tuple[int, int]
    include: Path
    runtime: Path  # libcudart_static.a

    @property
    def name(self) -> str:
        """As "nvcc 13.0"."""
        return "nvcc " + ".".join(map(str, self.version))


@dataclass(frozen=True)
class Plan:
    """What will be built. Without a toolkit it is nothing, and `description` says why."""

    description: str
    toolkit: Toolkit | None = None
    targets: tuple[str, ...] = ()  # "sm_90a", "compute_100"


def decide(environment: Mapping[str, str] = os.environ) -> Plan:
    """The plan; ends the build with one message where the request cannot be met."""
    wanted = environment.get("GCI_BUILD_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"GCI_BUILD_CUDA={wanted}: allowed are 1 (demand the CUDA kernels), 0 (leave them out) and nothing")
    if wanted == "0":
        return Plan("not built: GCI_BUILD_CUDA=0")
    listed = parse(environment.get("GCI_CUDA_ARCH_LIST", ""))
    try:
        toolkit = find(environment)
        gpus = () if listed is not None else this_machine(environment)
        targets, remarks = choose(listed or [], toolkit.version, gpus)
        check_compiler(toolkit, targets, environment)
    except Unavailable as reason:
        if wanted == "1":
            sys.exit(f"\nGCI_BUILD_CUDA=1, but gci_kernels cannot build its CUDA kernels: {reason}\n")
        return Plan(f"not built: {reason}")
    return Plan("; ".join([f"{' '.join(targets)}, by {toolkit.name}", *remarks]), toolkit, targets)


def parse(listed: str) -> list[tuple[str, bool]] | None:
    """The capabilities in GCI_CUDA_ARCH_LIST, each with whether PTX is wanted too.

    The list is empty for "all", the usual ones; None, where the variable is empty, means this machine's GPUs.
    """
    if not listed.strip():
        return None
    result = []
    for entry in re.split(r"[;, ]+", listed.strip()) if listed.strip() != "all" else ():
        capability, ptx = entry.removesuffix("+PTX"), entry.endswith("+PTX")
        if capability not in ARCHITECTURES:
            allowed = ", ".join(ARCHITECTURES)
            sys.exit(f"GCI_CUDA_ARCH_LIST={listed}: {entry!r} is none of {allowed}, with or without +PTX, nor all")
        result.append((capability, ptx))
    return result


def this_machine(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The capabilities of this machine's GPUs, each once, as nvidia-smi names them; none without a GPU or a driver."""
    program = shutil.which("nvidia-smi", path=environment.get("PATH"))
    if program is None:
        return ()
    done = run([program, "--query-gpu=compute_cap", "--format=csv,noheader"])
    return () if done.returncode else tuple(dict.fromkeys(re.findall(r"^\d+\.\d+$", done.stdout, re.MULTILINE)))


def choose(
    listed: list[tuple[str, bool]], version: tuple[int, int], gpus: tuple[str, ...] = ()
) -> tuple[tuple[str, ...], list[str]]:
    """nvcc's names of the targets, and remarks: for `listed`, else for `gpus`, else the usual ones."""
    unknown = [capability for capability, _ in listed if version < ARCHITECTURES[capability]]
    if unknown:
        first = ".".join(map(str, ARCHITECTURES[unknown[0]]))
        raise Unavailable(f"GCI_CUDA_ARCH_LIST names {unknown[0]}, which needs nvcc {first}")
    remarks: list[str] = []
    if not listed:
        listed, remarks = _for_gpus(gpus, version) if gpus else _usual(version)
    targets = []
    for capability, ptx in listed:
        number = capability.replace(".", "")
        # Code for sm_90a runs on that GPU only, so PTX for newer ones is compute_90.
        targets += [f"sm_{number}"] + ([f"compute_{number.rstrip('a')}"] if ptx else [])
    return tuple(dict.fromkeys(targets)), remarks


def _usual(version: tuple[int, int]) -> tuple[list[tuple[str, bool]], list[str]]:
    """The part of USUAL that nvcc knows, with PTX for the newest."""
    known = [capability for capability in USUAL if version >= ARCHITECTURES[capability]]
    left_out = [f"sm_{c.replace('.', '')} left out: it needs nvcc 12.8" for c in USUAL if c not in known]
    return [(capability, capability == known[-1]) for capability in known], left_out


def _for_gpus(gpus: tuple[str, ...], version: tuple[int, int]) -> tuple[list[tuple[str, bool]], list[str]]:
    """These GPUs only; the usual ones where one is newer than nvcc: its driver compiles their PTX."""
    recent = [gpu for gpu in gpus if int(gpu.partition(".")[0]) >= 8]
    if not recent:
        raise Unavailable(
            f"this machine's GPU has the capability {gpus[0]}; the kernels need 8.0 (GCI_CUDA_ARCH_LIST=all builds "
            "them for other machines)"
        )
    capabilities = [SPECIFIC.get(gpu, gpu) for gpu in recent]
    newer = [c for c in capabilities if version < ARCHITECTURES.get(c, (NEWEST[0] + 1, 0))]
    if newer:
        listed, remarks = _usual(version)
        return listed, [f"this machine's GPU of capability {newer[0]} is newer than nvcc", *remarks]
    return [(capability, False) for capability in capabilities], ["for this machine's GPUs"]


def find(environment: Mapping[str, str]) -> Toolkit:
    """The nvcc of CUDA_HOME or CUDA_PATH if set, else of PATH, else of /usr/local/cuda."""
    folder = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    if folder:
        nvcc = Path(folder, "bin", "nvcc")
        if not nvcc.exists():
            raise Unavailable(f"there is no bin/nvcc in {folder}, which CUDA_HOME or CUDA_PATH names")
    else:
        nvcc = Path(shutil.which("nvcc", path=environment.get("PATH")) or DEFAULT_FOLDER / "bin" / "nvcc")
        if not nvcc.exists():
            raise Unavailable(f"no nvcc: CUDA_HOME and CUDA_PATH are not set, PATH and {DEFAULT_FOLDER} lack it")
    done = run([str(nvcc), "--version"])
    said = re.search(r"release (\d+)\.(\d+)", done.stdout)
    if done.returncode or not said:
        raise Unavailable(f"{nvcc} does not say its version: {last_line(done.stderr or done.stdout)}")
    version = (int(said[1]), int(said[2]))
    if not OLDEST <= version <= NEWEST:
        raise Unavailable(f"{nvcc} is version {said[1]}.{said[2]}; 12.4 to 13.x fit")
    # nvcc may be a script that calls another one.
    top = re.search(r"TOP=(.*)", run([str(nvcc), "--dryrun", "-E", "-x", "cu", os.devnull]).stderr)
    root = Path(top[1].strip()).resolve() if top else nvcc.resolve().parents[1]
    folders = [root, *root.glob("targets/*")]
    include = [folder / "include" for folder in folders if (folder / "include" / "cuda_runtime_api.h").exists()]
    runtime = [p for folder in folders for p in folder.glob("lib*/libcudart_static.a")]
    if not include or not runtime:
        raise Unavailable(f"{root} has no {'libcudart_static.a' if include else 'cuda_runtime_api.h'}")
    return Toolkit(nvcc, version, include[0], runtime[0])


def last_line(text: str) -> str:
    """Of a program's output."""
    return (text.strip().splitlines() or ["nothing"])[-1]


def command(toolkit: Toolkit, targets: tuple[str, ...], environment: Mapping[str, str]) -> list[str]:
    """nvcc with all options except the files."""
    codes = [f"-gencode=arch={target.replace('sm', 'compute')},code={target}" for target in targets]
    words = [word for word in environment.get("CXX", "").split() if Path(word).name not in LAUNCHERS]
    host = ["-ccbin", words[0]] if words else []
    return [str(toolkit.nvcc), *host, *FLAGS, *codes]


def check_compiler(toolkit: Toolkit, targets: tuple[str, ...], environment: Mapping[str, str]) -> None:
    """Raise Unavailable unless nvcc can compile; many reject the host compiler that they find."""
    text = "__global__ void probe(int* p) { *p = 1; }\n"
    done = probe([*command(toolkit, targets[:1], environment), "-c"], "probe.cu", text)
    if done.returncode:
        said = re.search(r"error.*", done.stdout + done.stderr)
        raise Unavailable(f"{toolkit.nvcc} cannot compile: {said[0] if said else last_line(done.stderr)}")


def digest(compiler: str, csrc: Path = Path("csrc")) -> str:
    """sha256 over the kernels' compiler, flags and sources: builds with the same digest have the same kernels."""
    total = hashlib.sha256(" ".join([compiler, *FLAGS]).encode() + b"\0")
    for path in sorted(path for folder in ("common", "cuda") for path in (csrc / folder).iterdir()):
        total.update(path.relative_to(csrc).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()


def write_header(plan: Plan, folder: Path) -> Path:
    """cuda_build.h, which tells the extension what was built; touched only where it changes."""
    defined = {"GCI_CUDA_BUILD": json.dumps(plan.description)}
    if plan.toolkit is not None:
        compiler = plan.toolkit.name
        defined |= {"GCI_HAS_CUDA": "1", "GCI_CUDA_COMPILER": json.dumps(compiler)}
        defined |= {"GCI_CUDA_DIGEST": json.dumps(digest(compiler))}
    text = "".join(f"#define {name} {value}\n" for name, value in defined.items())
    return write_if_changed(folder / "cuda_build.h", text)


def host(plan: Plan) -> tuple[Sequence[str], Sequence[Path]]:
    """Sources for the host compiler, and folders of headers for them; none without a toolkit."""
    return ((), ()) if plan.toolkit is None else (HOST_SOURCES, (plan.toolkit.include,))


def objects(plan: Plan, folder: Path, environment: Mapping[str, str] = os.environ) -> list[Object]:
    """The objects that nvcc compiles; none without a toolkit."""
    if plan.toolkit is None:
        return []
    nvcc = tuple(command(plan.toolkit, plan.targets, environment))
    return [Object(str(folder / (Path(source).stem + ".o")), source, nvcc) for source in SOURCES]
