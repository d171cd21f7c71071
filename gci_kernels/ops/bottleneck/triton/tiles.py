"""The order in which the tiles of a product are computed."""

import triton
import triton.language as tl


@triton.jit
def tile_of(number, tiles_t, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile: neighbours share GROUP rows, so that w's columns are read from L2, not again."""
    first = number // (GROUP * tiles_n) * GROUP
    rows = tl.minimum(tiles_t - first, GROUP)
    return first + number % (GROUP * tiles_n) % rows, number % (GROUP * tiles_n) // rows
