"""What the next batch holds: whose rows, and how many of each.

Every batch has one row per generating sequence first and is filled up with prompt chunks, oldest request first, as far
as :class:`PrefillPace` allows.

Images and sounds are encoded in a step of their own, and what comes of it is computed in batches of its own; after each
of these a step belongs to the others.

A batch is computed with one set of LoRA adapters. Sequences of different sets take turns.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from llamaherd.pool.child.adapters import Adapters, Turns
from llamaherd.pool.child.context import Context
from llamaherd.pool.child.pace import PrefillPace
from llamaherd.pool.child.prefix import Rules
from llamaherd.pool.child.sequence import Sequence

__all__ = ["Composer", "Part"]


@dataclass(slots=True)
class Part:
    """A sequence's share of one batch. ``row`` is the row with its logits, or -1 while its prompt is unfinished."""

    sequence: Sequence
    n_tokens: int
    row: int


class Composer:
    """Fills the batches of one context.

    Args:
        running: All who run, in the order of their arrival; read anew for each batch.
        rules: Which prefixes this model can reuse.
        adapters: The model's LoRA adapters.
        pace: How much of prompts a step may hold.
    """

    def __init__(
        self,
        context: Context,
        running: Collection[Sequence],
        rules: Rules,
        adapters: Adapters,
        pace: PrefillPace,
    ) -> None:
        self._context: Final = context
        self._running: Final = running
        self._rules: Final = rules
        self._adapters: Final = adapters
        self._turns: Final = Turns()
        self._pace: Final = pace
        #: Whether the last step was about an image or a sound.
        self._looked = False

    def ready(self) -> list[Sequence]:
        """Return the sequences that the next batch may hold, and have the context apply their adapters."""
        ready = [one for one in self._running if one.leader is None]
        if not len(self._adapters):
            return ready
        turn = self._turns.choose(one.adapters for one in ready)
        self._adapters.apply(self._context.handle, turn)
        return [one for one in ready if one.adapters == turn]

    def viewer(self, ready: list[Sequence]) -> Sequence | None:
        """Return the sequence whose image or sound this step is about; None for a step of tokens."""
        viewers = [one for one in ready if one.has_media and one.chunk is not None]
        self._looked = bool(viewers) and not (self._looked and len(viewers) < len(ready))
        return viewers[0] if self._looked else None

    def fill(self, ready: list[Sequence], viewer: Sequence | None) -> list[Part]:
        """Fill the batch; return whose it is."""
        return self._build(ready) if viewer is None else self._show(viewer)

    def note(self, seconds: float) -> None:
        """The last batch took so long."""
        self._turns.note(seconds)

    def _show(self, viewer: Sequence) -> list[Part]:
        """Fill the batch with a chunk's rows, or with as many as are due if it need not be whole."""
        batch, chunk = self._context.batch, viewer.chunk
        batch.clear()
        if chunk is None or chunk.rows is None:
            return []
        done = viewer.computed - chunk.start
        rows = chunk.rows[done:]
        if not chunk.whole:
            wanted = self._pace.tokens([(viewer.computed, len(rows))], shared=len(self._running) > 1)
            rows = rows[: min(wanted, batch.capacity)]
        positions = chunk.positions(viewer.position(chunk.start))
        batch.embed(viewer.slot, positions[:, done : done + len(rows)], rows)
        return [Part(viewer, len(rows), -1)]

    def _build(self, ready: list[Sequence]) -> list[Part]:
        batch = self._context.batch
        batch.clear()
        parts: list[Part] = []
        rows: list[Sequence] = []
        prompts: list[Sequence] = []
        for one in ready:
            if not (one.has_media and one.chunk is not None):
                (rows if one.pending == 1 else prompts).append(one)
        if not self._context.unified:
            rows.sort(key=_by_slot)  # llama.cpp computes them together only in the order of their ids
        for sequence in rows:
            row = batch.add(sequence.slot, sequence.position(sequence.computed), sequence.tokens[-1])
            parts.append(Part(sequence, 1, row))
        if prompts:
            waiting = [(one.computed, one.pending) for one in prompts]
            wanted = self._pace.tokens(waiting, shared=bool(parts), beside=len(parts))
            self._add_prompts(prompts, parts, min(wanted, batch.room))
        return parts

    def _add_prompts(self, prompts: list[Sequence], parts: list[Part], budget: int) -> None:
        for sequence in prompts:
            count = min(sequence.pending, sequence.ahead, budget, self._next_stop(sequence))
            if count == 0:
                return
            last = count == sequence.pending
            chunk = sequence.tokens[sequence.computed : sequence.computed + count]
            row = self._context.batch.extend(sequence.slot, sequence.position(sequence.computed), chunk, output=last)
            parts.append(Part(sequence, count, row if last else -1))
            budget -= count

    def _next_stop(self, sequence: Sequence) -> int:
        """Return how many tokens a sequence may compute before a follower of it needs it to halt."""
        stops = [self._context.batch.capacity]
        if self._rules.exact:
            stops += [one.shared - sequence.computed for one in self._running if one.leader is sequence]
        return min(stops)


def _by_slot(sequence: Sequence) -> int:
    return sequence.slot
