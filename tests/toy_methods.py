"""HydraLoRA of examples/hydralora.py: the tests of all methods run over it unchanged, as over any that a user adds."""

import importlib.util
import sys
from pathlib import Path

_PATH = Path(__file__).parents[1] / "examples" / "hydralora.py"


def _load():
    """The example as a module, once: what it registers may be registered once."""
    if "hydralora" not in sys.modules:
        spec = importlib.util.spec_from_file_location("hydralora", _PATH)
        module = importlib.util.module_from_spec(spec)
        sys.modules["hydralora"] = module  # pickles name it
        spec.loader.exec_module(module)
    return sys.modules["hydralora"]


HydraLoRAConfig = _load().HydraLoRAConfig
