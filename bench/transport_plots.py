"""The pictures of the transport benchmark."""

from collections.abc import Sequence
from pathlib import Path

from plots import Bars, Line, bars, lines
from samples import Figure
from transport_report import STATE
from transport_world import PROCESS_TRANSPORTS

__all__ = ["draw"]


def draw(folder: Path, figures: Sequence[Figure], loop: str) -> list[tuple[str, str]]:
    """Draw all pictures for one loop; return their titles and file names."""
    here = [figure for figure in figures if figure.loop in (loop, "none")]
    drawn: list[tuple[str, str]] = []

    def path(name: str, title: str) -> Path:
        drawn.append((title, name))
        return folder / name

    title = f"Round trip of 50 bytes ({loop}): median, and p99 as a mark"
    rows = [
        Bars(figure.transport, figure.values["p50_us"].median, figure.values["p99_us"].median)
        for figure in here
        if figure.measure == "round_trip" and figure.variant == STATE
    ]
    rows.sort(key=lambda row: row.name.startswith("floor"))
    bars(path("transport-round-trip.svg", title), title, "microseconds", rows)
    for name, title, x_label, y_label, shown in (
        (
            "transport-delay.svg",
            f"One-way delay of a decode step, median ({loop})",
            "decode steps a second",
            "microseconds",
            _lines(here, "one_way", "p50_us", "/s"),
        ),
        (
            "transport-throughput.svg",
            f"Throughput, worker to pool ({loop})",
            "bytes in a message",
            "MB/s",
            _lines(here, "throughput", "MB_per_s", " up"),
        ),
        (
            "transport-fan-in.svg",
            f"Fan-in: messages a second from many workers ({loop})",
            "workers",
            "messages/s",
            _lines(here, "fan_in", "messages_per_s", " workers"),
        ),
        (
            "transport-fan-in-cost.svg",
            f"Fan-in: the pool's processor time for a message ({loop})",
            "workers",
            "microseconds",
            _lines(here, "fan_in", "pool_cpu_us", " workers"),
        ),
    ):
        lines(path(name, title), title, x_label, y_label, shown, y_scale="linear" if x_label == "workers" else "log")
    return drawn


def _lines(figures: Sequence[Figure], measure: str, value: str, ending: str) -> list[Line]:
    points: dict[str, list[tuple[float, float, float, float]]] = {}
    for figure in figures:
        if figure.measure == measure and figure.variant.endswith(ending):
            spread = figure.values[value]
            place = _quantity(figure.variant.removesuffix(ending))
            points.setdefault(figure.transport, []).append((place, spread.median, spread.low, spread.high))
    # In the order of the transports, so that each has the same colour in all pictures; the floors come last.
    first = (*PROCESS_TRANSPORTS, "memory")
    names = [*filter(points.__contains__, first), *(name for name in points if name not in first)]
    return [Line(name, *zip(*sorted(points[name]), strict=True)) for name in names]


def _quantity(text: str) -> float:
    count, _, unit = text.partition(" ")
    return float(count) * {"KiB": 2**10, "MiB": 2**20}.get(unit, 1)
