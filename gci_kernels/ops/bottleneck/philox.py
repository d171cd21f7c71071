"""Dropout's counter-based random numbers in torch operations: the definition that every kernel reproduces.

Element [row, col] uses word col % 4 of Philox4x32-10 (Salmon et al., SC 2011) with the key (seed low, seed high) and
the counter (col // 4, row low, row high, 0), and is kept if that word is at least p * 2^32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


class Dropout(NamedTuple):
    """Dropout of an operand [tokens, width] of a product, seen by the first `columns` of what it is multiplied with.

    Attributes:
        p: the probability in [0, 1) with which an element is dropped.
        seed: of the generator; 64 bits: a number, or an int64 scalar, which the kernels read when they run, so that a
            captured CUDA graph has a new mask for each new seed. On the CPU, or for a GPU on it. Or the mask itself:
            int32 [tokens, ceil(width / 32)], bit c % 32 of word c // 32 says whether column c is kept.
        columns: how many columns of the product are computed from the masked operand; the others are not.
    """

    p: float
    seed: int | Tensor
    columns: int

    @property
    def threshold(self) -> int:
        """An element is kept if its 32-bit word is at least this."""
        return int(self.p * 2**32)

    @property
    def scale(self) -> float:
        """The factor of elements that are kept."""
        return 1 / (1 - self.p)

    @property
    def mask(self) -> Tensor | None:
        """:attr:`seed` where that is the mask itself."""
        return self.seed if isinstance(self.seed, Tensor) and self.seed.dim() == 2 else None


def keep_mask(rows: int, cols: int, p: float, seed: int | Tensor, device: torch.device) -> Tensor:
    """Bool [rows, cols] on `device`: the elements that dropout with probability `p` and `seed` keeps.

    `seed` is anything that :attr:`Dropout.seed` may be; one that is on a GPU is not waited for.
    """
    if isinstance(seed, Tensor) and seed.dim() == 2:
        return (seed.unsqueeze(2) >> torch.arange(32, device=device) & 1).flatten(1)[:, :cols].bool()
    row = torch.arange(rows, device=device).unsqueeze(1)
    c0 = torch.arange((cols + 3) // 4, device=device).expand(rows, -1)
    c1, c2, c3 = (row & _WORD).expand_as(c0), (row >> 32).expand_as(c0), torch.zeros_like(c0)
    key0, key1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        # A product of two 32-bit words can exceed 2^63 and wrap to a negative int64; the masks undo the sign extension.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32 & _WORD) ^ c1 ^ key0, b & _WORD, (a >> 32 & _WORD) ^ c3 ^ key1, a & _WORD
        key0, key1 = key0 + 0x9E3779B9 & _WORD, key1 + 0xBB67AE85 & _WORD
    words = torch.stack((c0, c1, c2, c3), dim=-1).flatten(1)[:, :cols]
    return words >= Dropout(p, seed, cols).threshold


def draw_seed(device: torch.device) -> Tensor:
    """A seed, int64 [], from torch's default generator, so that torch.manual_seed and checkpointing reproduce it.

    For a GPU it is drawn and stays there: the kernels read it, nothing waits for it, and where a CUDA graph captures
    the call every replay draws another. Elsewhere it is on the CPU.
    """
    return torch.randint(2**62, (), dtype=torch.int64, device=device if device.type == "cuda" else "cpu")
