"""For how many rows the attention of a batch takes the time."""

import pytest

from llamaherd.pool.child.tiles import attended


def count_tiles(rows: int, heads: int, threads: int) -> int:
    """Count as ggml does: every row of every head in a line, cut into shares, and those at heads and every 64 rows."""
    lines = rows * heads
    size = -(-lines // (4 * threads))
    shares = -(-lines // size)
    if threads == 1 or shares < threads:
        shares = threads
    size = -(-lines // shares)
    tiles = held = 0
    for line in range(lines):
        held = 0 if line % size == 0 or line % rows == 0 or held == 64 else held
        tiles += held == 0
        held += 1
    return tiles


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("heads", [1, 9, 14, 32])
@pytest.mark.parametrize("rows", [64, 65, 100, 128, 192, 255, 512])
def test_it_is_what_ggml_computes(rows: int, heads: int, threads: int) -> None:
    assert attended(rows, heads, threads) == count_tiles(rows, heads, threads) * 64 / heads


def test_fewer_rows_than_a_tile_has_are_computed_one_by_one() -> None:
    assert attended(10, 9, 2) == 10 * attended(1, 9, 2) > 10
    assert attended(0, 9, 2) == 0


def test_whole_tiles_cost_nothing_for_nothing_where_threads_share_heads_evenly() -> None:
    assert attended(128, 32, 8) == 128
    assert attended(129, 32, 8) == 192
