"""The layer and tuner classes that tuners/registration.py makes of registered methods: here pickle finds them."""

from typing import Any


def __getattr__(name: str) -> Any:
    raise AttributeError(
        f"gci_kernels.tuners.registered has no {name}: its method is not registered here; import the module that calls "
        "gci_kernels.register for it first"
    )
