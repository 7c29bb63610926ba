"""Arithmetic of embeddings: parts of an input joined to one vector, and its normalisation as the reference does it."""

from collections.abc import Iterator
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

__all__ = ["Floats", "Pooled", "normalized", "slices", "to_bytes"]

Floats = npt.NDArray[np.float32]

#: What the largest component becomes with ``normalize`` 0: 16-bit integers hold it.
_INT16_RANGE: Final = 32760.0
_NONE, _LARGEST, _EUCLIDEAN = -1, 0, 2


class Pooled:
    """The vector of an input that may come in several chunks, each pooled for itself.

    Args:
        how: ``mean``, ``cls`` (the first token's), ``last`` or ``rank`` (the last chunk's).
    """

    def __init__(self, how: Literal["mean", "cls", "last", "rank"]) -> None:
        self._how: Final = how
        self._value: Floats | None = None
        self._tokens = 0

    def add(self, chunk: Floats, tokens: int) -> None:
        """Take the vector of the next ``tokens`` tokens. The array is copied."""
        if self._value is None or self._how in ("last", "rank"):
            self._value = chunk.copy()
        elif self._how == "mean":
            share = tokens / (self._tokens + tokens)
            self._value = np.add(self._value * np.float32(1 - share), chunk * np.float32(share), dtype=np.float32)
        self._tokens += tokens

    @property
    def value(self) -> Floats:
        """The vector of what was added."""
        assert self._value is not None, "nothing was added"
        return self._value


def normalized(vector: Floats, p: int) -> Floats:
    """Return a vector scaled as the reference's ``embd_normalize`` says; zeros stay zeros.

    Args:
        p: -1: as it is; 0: its largest component becomes 32760; otherwise its p-norm becomes 1.
    """
    if p == _NONE:
        return vector
    exact = vector.astype(np.float64)
    sizes = np.abs(exact)
    largest = float(sizes.max(initial=0.0))
    if largest == 0.0:
        return np.zeros_like(vector)
    if p == _LARGEST:
        norm = largest / _INT16_RANGE
    elif p == _EUCLIDEAN:
        norm = float(np.sqrt((sizes * sizes).sum()))
    else:
        # Relative to the largest, so that no power overflows.
        norm = largest * float(((sizes / largest) ** p).sum()) ** (1.0 / p)
    scaled: Floats = (exact / norm).astype(np.float32)
    return scaled


def slices(rows: Floats, most_bytes: int) -> Iterator[tuple[int, Floats]]:
    """Split a matrix into runs of rows, each with its first row's number; as large as allowed, but one row at least."""
    step = max(1, most_bytes // max(1, rows.shape[1] * rows.itemsize))
    for start in range(0, rows.shape[0], step):
        yield start, rows[start : start + step]


def to_bytes(rows: Floats) -> bytes:
    """Return 32-bit floats, little-endian, row by row."""
    return rows.astype("<f4", copy=False).tobytes()
