"""How ggml's attention on CPUs divides a batch, and how much it computes for nothing by that.

It computes tiles of 64 rows of one head (``GGML_FA_TILE_Q``), and a tile that is not full costs as much as one that is.
The rows of all heads, one head behind the other, are cut into four shares for each thread, and a tile ends where its
share ends, so how many tiles there are depends on heads and threads too: with 9 heads and 2 threads 128 rows cost as
much as 170, and 512 no more than 512. Fewer rows than a tile has are computed one by one, which takes longer. See
``ggml_compute_forward_flash_attn_ext_f16`` in ggml-cpu/ops.cpp.
"""

from functools import lru_cache
from typing import Final

__all__ = ["TILE", "attended"]

#: Rows of a tile.
TILE: Final = 64
#: For how many rows in tiles a row by itself takes the time: measured with SmolLM2, two threads and 5,000 tokens.
_ALONE: Final = 3.0
_SHARES: Final = 4


@lru_cache(4096)
def attended(rows: int, heads: int, threads: int) -> float:
    """Return for how many rows in full tiles the attention of a batch takes the time, at least ``rows``.

    Args:
        heads: Query heads of the model.
        threads: How many compute it.
    """
    if rows < TILE:
        return rows * _ALONE
    lines = rows * heads
    shares = -(-lines // -(-lines // (threads * _SHARES)))
    share = -(-lines // (threads if threads == 1 or shares < threads else shares))
    tiles = 0
    for start in range(0, lines, share):
        end = min(start + share, lines)
        while start < end:
            start += min(TILE, end - start, rows - start % rows)
            tiles += 1
    return tiles * TILE / heads
