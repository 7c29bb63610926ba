"""The one batch of a context: rows written through numpy views, read by llama.cpp in place."""

from array import array
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from llamaherd.pool.child import llama_context, llama_log

__all__ = ["Batch", "Folds", "position_of"]

#: Where positions fall behind tokens: from a token's index on, and by how many more. Images under M-RoPE have more
#: tokens than positions.
Folds: TypeAlias = tuple[tuple[int, int], ...]


def position_of(folds: Folds, index: int) -> int:
    """Return the position of the token ``index``, which is not within a fold."""
    return index - sum(count for end, count in folds if end <= index)


class Batch:
    """Up to ``capacity`` rows of one token each, reused for the context's whole life.

    Every row belongs to one sequence. Nothing checks the ids: callers pass tokens of the vocabulary, positions that
    continue their sequence, and at most as many outputs as the context was created for.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity: Final = capacity
        self.n_rows = 0
        #: Rows computed, and calls that computed them, since the context exists.
        self.n_computed = 0
        self.n_decoded = 0
        self._tokens: npt.NDArray[np.int32] = np.zeros(capacity, np.int32)
        self._positions: npt.NDArray[np.int32] = np.zeros(capacity, np.int32)
        self._sequences: npt.NDArray[np.int32] = np.zeros(capacity, np.int32)
        self._outputs: npt.NDArray[np.int8] = np.zeros(capacity, np.int8)
        #: Embeddings, where the batch is not of tokens.
        self._rows: npt.NDArray[np.float32] | None = None
        self._places: npt.NDArray[np.int32] = self._positions
        # Single rows go through memoryviews, which cost half of what numpy's own indexing does.
        self._token, self._position = self._tokens.data, self._positions.data
        self._sequence, self._output = self._sequences.data, self._outputs.data
        self._counts: npt.NDArray[np.int32] = np.ones(capacity, np.int32)
        # llama.cpp wants a list of sequence ids per row: each pointer leads to that row's single entry.
        first = self._sequences.ctypes.data
        self._lists: npt.NDArray[np.uint64] = np.arange(first, first + 4 * capacity, 4, dtype=np.uint64)
        self._struct = llama_context.batch_struct(
            self._tokens.ctypes.data,
            self._positions.ctypes.data,
            self._counts.ctypes.data,
            self._lists.ctypes.data,
            self._outputs.ctypes.data,
        )

    @property
    def room(self) -> int:
        """Rows that still fit."""
        return self.capacity - self.n_rows

    def clear(self) -> None:
        """Start a new batch."""
        self.n_rows = 0
        self._rows = None

    def add(self, sequence: int, position: int, token: int) -> int:
        """Append one token whose logits are wanted; return its row."""
        row = self.n_rows
        self._token[row] = token
        self._position[row] = position
        self._sequence[row] = sequence
        self._output[row] = 1
        self.n_rows = row + 1
        return row

    def extend(self, sequence: int, position: int, tokens: "array[int]", *, output: bool = False) -> int:
        """Append consecutive tokens from ``position`` on; return the last row, whose logits ``output`` asks for."""
        start, end = self.n_rows, self.n_rows + len(tokens)
        self._tokens[start:end] = tokens
        self._positions[start:end] = np.arange(position, position + len(tokens), dtype=np.int32)
        self._sequences[start:end] = sequence
        self._outputs[start:end] = 0
        self._outputs[end - 1] = output
        self.n_rows = end
        return end - 1

    def want_all(self) -> None:
        """Ask for the output of every row so far."""
        self._outputs[: self.n_rows] = 1

    def embed(self, sequence: int, positions: npt.NDArray[np.int32], rows: npt.NDArray[np.float32]) -> None:
        """Fill the batch with embeddings instead of tokens. No logits come of them.

        ``positions`` has one row of as many as there are embeddings, or four for models with M-RoPE.
        """
        count = len(rows)
        self._rows = np.ascontiguousarray(rows, np.float32)
        self._places = np.ascontiguousarray(positions, np.int32)
        self._sequences[:count] = sequence
        self._outputs[:count] = 0
        self.n_rows = count

    def decode(self, context: int) -> int:
        """Compute the rows; the codes are those of :func:`llama_context.decode`. Returns when the result is there."""
        struct = self._struct
        if self._rows is not None:
            struct = llama_context.embedding_struct(struct, self._rows.ctypes.data, self._places.ctypes.data)
        llama_log.forget_errors()  # a refusal's reason is not what something else said before it
        code = llama_context.decode(context, struct, self.n_rows)
        if code == 0:
            llama_context.synchronize(context)
            self.n_computed += self.n_rows
            self.n_decoded += 1
        return code
