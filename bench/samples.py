"""What a benchmark measures, and how rounds become figures."""

import statistics
from collections.abc import Iterable, Sequence

import msgspec

__all__ = ["Figure", "Key", "Sample", "Spread", "percentile", "summarise", "summary", "tails"]

#: (measure, transport, loop, variant)
Key = tuple[str, str, str, str]


class Sample(msgspec.Struct, frozen=True):
    """One round of one cell.

    Attributes:
        measure: What was measured, such as ``round_trip``.
        transport: On what, such as ``pipe`` or ``floor: socketpair``.
        loop: ``asyncio`` or ``uvloop``, or ``none`` where both sides block.
        variant: The setting, such as ``50 B`` or ``1000/s``.
        values: Figures by name; the name ends in the unit.
    """

    measure: str
    transport: str
    loop: str
    variant: str
    values: dict[str, float]

    @property
    def key(self) -> Key:
        return (self.measure, self.transport, self.loop, self.variant)


class Spread(msgspec.Struct, frozen=True):
    """One figure over all rounds."""

    median: float
    low: float
    high: float
    rounds: int


class Figure(msgspec.Struct, frozen=True):
    """One cell over all rounds; the fields are a sample's."""

    measure: str
    transport: str
    loop: str
    variant: str
    values: dict[str, Spread]


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the smallest value that at least ``share`` (0 to 1) of the sorted values do not exceed."""
    if not ordered:
        raise ValueError("no values")
    rank = -int(-share * len(ordered) // 1)  # rounded up
    return ordered[max(0, min(len(ordered), rank) - 1)]


def tails(nanoseconds: Iterable[int], prefix: str = "") -> dict[str, float]:
    """Return the median, the 99th and the 99.9th percentile of some durations, in microseconds."""
    ordered = sorted(ns / 1000 for ns in nanoseconds)
    return {
        f"{prefix}p{name}_us": percentile(ordered, share)
        for name, share in (("50", 0.5), ("99", 0.99), ("99.9", 0.999))
    }


def summarise(samples: Iterable[Sample]) -> list[Figure]:
    """Return one figure per cell, in the order in which the cells first appear."""
    cells: dict[Key, list[Sample]] = {}
    for sample in samples:
        cells.setdefault(sample.key, []).append(sample)
    return [Figure(*key, {name: _spread(rounds, name) for name in rounds[0].values}) for key, rounds in cells.items()]


def _spread(rounds: Sequence[Sample], name: str) -> Spread:
    values = [sample.values[name] for sample in rounds if name in sample.values]
    return Spread(statistics.median(values), min(values), max(values), len(values))


def summary(values: Sequence[float], scale: float) -> dict[str, float]:
    """Return the median, the quartiles and the 99th percentile, scaled."""
    ordered = sorted(value * scale for value in values)
    low, middle, high = statistics.quantiles(ordered, n=4) if len(ordered) > 1 else (ordered[0],) * 3
    low, high = max(low, ordered[0]), min(high, ordered[-1])  # of two values they would lie outside
    p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    figures = {"median": middle, "q1": low, "q3": high, "p99": p99}
    return {name: round(figure, 3) for name, figure in figures.items()} | {"n": len(ordered)}
