"""A heat map of the selected rows."""

import os
from collections.abc import Sequence

import numpy as np

BINS = 128


def draw_positions(positions: Sequence[Sequence[int]], out: int, path: str | os.PathLike, title: str = "") -> None:
    """A heat map as PNG, a line for each layer: the share of chosen rows in each of up to 128 ranges of `out` rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    edges = np.linspace(0, out, min(out, BINS) + 1)
    # The last edge belongs to no range otherwise; rows are whole numbers, so half a row more changes none of them.
    rows = np.stack([np.histogram(rows, edges)[0] for rows in positions])
    possible = np.histogram(np.arange(out), edges)[0]
    shares = 100 * rows / possible
    height = min(10, 1.6 + 0.16 * len(positions))
    figure, axis = plt.subplots(figsize=(10, height), dpi=100, layout="constrained")
    image = axis.imshow(
        shares, aspect="auto", cmap="magma", interpolation="nearest", extent=(0, out, len(positions), 0)
    )
    axis.set(xlabel="row of the projection", ylabel="layer", title=title)
    figure.colorbar(image, ax=axis, label="chosen, percent")
    figure.savefig(path, format="png")
    plt.close(figure)
