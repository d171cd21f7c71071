"""What type checkers see: py.typed promises that annotations are right."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# A user's program: every line of it is right, but those marked.
PROGRAM = """
import torch
from torch import nn

import gci_kernels
from gci_kernels import ALoRAConfig, LoKIConfig, LoRAMoEConfig
from gci_kernels.ops import alora_linear, loki_linear, lora_linear, loramoe_linear

x, A, B, router = torch.ones(3, 4), torch.ones(2, 4), torch.ones(5, 2), torch.ones(1, 4)
y: torch.Tensor = lora_linear(x, None, None, A, B, scaling=0.5)
z, gates = loramoe_linear(x, torch.ones(5, 4), None, A, B, router, scaling=2, top_k=1, impl="aten")
z.add_(gates.sum())

LoRAMoEConfig(r=4, target_modules={"up_proj"}, top_k=None)
ALoRAConfig(r=8, num_heads=2, target_modules="all-linear", residual=True)
LoKIConfig(positions=[[1, 2], [3]], target_modules=["down_proj"])
LoKIConfig(positions={"model.layers.0.mlp.down_proj": [1]}, r=2)

model: nn.Module = gci_kernels.patch(nn.Linear(4, 4), LoRAMoEConfig(), adapter_name="mine")
for line in gci_kernels.report(model):
    print(line.name.upper(), line.declined or line.plan)
model = gci_kernels.unpatch(model)

LoRAMoEConfig(num_experts="8")  # wrong
gci_kernels.report(model).plans  # wrong
lora_linear(x, None, None, A, B)  # wrong
"""


def mypy(*arguments: str | Path) -> subprocess.CompletedProcess:
    """What mypy prints, by pyproject.toml's settings and with its cache, which CI has filled by then."""
    command = [sys.executable, "-m", "mypy", "--no-error-summary", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_the_package_is_clean():
    done = mypy()
    assert (done.stdout, done.returncode) == ("", 0), done.stdout + done.stderr


def test_a_program_is_checked_against_it(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = mypy(program)
    wrong = [number for number, line in enumerate(PROGRAM.splitlines(), 1) if line.endswith("# wrong")]
    assert [int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error:" in line] == wrong, done.stdout
