"""Context shift: a generation whose context is full forgets the older half of its middle and goes on.

What stays was computed in the sight of what went, so behind the kept beginning the cells are no longer what the
remaining tokens alone would give: from then on only that beginning may be reused by others. A cell has one position for
all sequences that hold it, so only cells that belong to the sequence alone can be moved.
"""

from typing import Final

__all__ = ["cut"]

#: Tokens of a full context that are never all kept.
_LEAST_FREED: Final = 4


def cut(*, n_ctx: int, computed: int, n_prompt: int, n_keep: int, n_discard: int, adds_bos: bool) -> tuple[int, int]:
    """Return which tokens go: from where, and up to where.

    The reference's rule (``tools/server/server-context.cpp``): -1 keeps the whole prompt, a BOS token counts extra, at
    least four tokens of the context are not kept, and of what follows half goes where no number is given; the newest
    computed token always stays.

    Args:
        n_ctx: Tokens of a full context.
        computed: Tokens of the sequence that are computed.
    """
    keep = n_prompt if n_keep < 0 else n_keep
    keep = max(0, min(keep + adds_bos, n_ctx - _LEAST_FREED, computed - 2))
    left = computed - keep
    return keep, keep + min(n_discard or left // 2, left - 1)
