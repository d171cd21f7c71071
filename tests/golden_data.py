"""The golden data in tests/golden, file by file: a test that names a missing one fails, none collects nothing."""

from pathlib import Path

from safetensors import safe_open
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"
LORAMOE = ("loramoe_linear_0", "loramoe_linear_1", "loramoe_linear_2")
LOKI = ("loki_linear_0", "loki_linear_1", "loki_linear_2")
ATTRIBUTION = ("kva_tiny_llama_0", "kva_tiny_llama_1")


def load(name: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Settings and tensors of one file."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
