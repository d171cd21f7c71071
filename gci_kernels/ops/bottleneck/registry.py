"""The registered mixers."""

from gci_kernels.ops.bottleneck.by_autograd import ByAutograd
from gci_kernels.ops.bottleneck.mixer import Mixer, Stages

#: By name.
MIXERS: dict[str, Mixer] = {}
#: What runs a mixer's forward and backward, by its name.
STAGES: dict[str, Stages] = {}


def register(mixer: Mixer) -> Mixer:
    """Makes a mixer known to :func:`gci_kernels.ops.bottleneck_linear`, and returns it.

    Raises:
        ValueError: another one is registered under this name.
    """
    if MIXERS.setdefault(mixer.name, mixer) != mixer:
        raise ValueError(f"a mixer {mixer.name!r} is registered already; give this one another name")
    STAGES[mixer.name] = mixer.stages or ByAutograd(mixer)
    return mixer


def find(name: str) -> Mixer:
    """The registered mixer `name`; ValueError names those that there are."""
    if name not in MIXERS:
        raise ValueError(f"no mixer {name!r} is registered; there are {', '.join(sorted(MIXERS))}")
    return MIXERS[name]
