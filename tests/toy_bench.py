"""A wrong adapter for the gate of the benchmark."""

import gci_kernels


def wrong_by(factor: float, role: str):
    """loramoe_linear with one of its results, or one gradient, multiplied by `factor`."""
    right = gci_kernels.ops.loramoe_linear

    def wrong(x, weight, bias, A, B, router, **options):
        if role == "dA":  # the value stays, the gradient grows
            A = A * factor - (A * (factor - 1)).detach()
        y, gates = right(x, weight, bias, A, B, router, **options)
        return (y * factor if role == "y" else y), gates

    return wrong
