"""Pictures for the reports: SVG on a transparent ground, in colours that can be read on white and on black."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, Final, NamedTuple

import matplotlib

matplotlib.use("svg")

from matplotlib.figure import Figure

__all__ = ["Bars", "Line", "bars", "lines"]

#: Mid tones: each has a contrast of about 3:1 or more to both white and near-black.
PALETTE: Final = ("#3b82c4", "#d9772b", "#3a9a5b", "#c2528b", "#8a6fd1", "#a08420", "#2f9c9c", "#9a6a5a")
INK: Final = "#808080"
_SIZE: Final = (8.0, 4.5)
_DASHES: Final = ("--", ":", "-.", (0, (1, 3)), (0, (6, 2, 1, 2)))


class Line(NamedTuple):
    """One line: its name, and points with the ends of a band around each y. Floors are drawn grey and dashed."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


class Bars(NamedTuple):
    """One row of a bar chart: a solid bar up to ``value`` and a thin mark at ``mark``."""

    name: str
    value: float
    mark: float


def _canvas(title: str, x_label: str, y_label: str) -> tuple[Figure, Any]:
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "llamaherd", "font.family": "sans-serif"})
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes: Any = figure.add_subplot()
    axes.set_title(title, color=INK, fontsize=12)
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.tick_params(which="both", colors=INK)
    axes.grid(which="major", color=INK, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_color(INK)
        spine.set_visible(side in ("left", "bottom"))
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    untyped: Any = figure  # matplotlib's annotations here are not complete
    untyped.savefig(path, format="svg", transparent=True, metadata={"Date": None})


def lines(path: Path, title: str, x_label: str, y_label: str, shown: Sequence[Line], *, y_scale: str = "log") -> None:
    """Draw lines over a logarithmic axis; ``y_scale`` is ``log``, or ``linear`` from zero."""
    figure, axes = _canvas(title, x_label, y_label)
    colours, dashes = iter(cycle(PALETTE)), iter(cycle(_DASHES))
    for line in shown:
        floor = line.name.startswith("floor")
        colour, dash = (INK, next(dashes)) if floor else (next(colours), "-")
        axes.plot(
            line.x, line.y, color=colour, linestyle=dash, marker="o", markersize=4, linewidth=1.6, label=line.name
        )
        axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.08 if floor else 0.18, linewidth=0)
    axes.set_xscale("log")
    axes.set_yscale(y_scale)
    if y_scale == "linear":
        axes.set_ylim(bottom=0)
    ticks = sorted({x for line in shown for x in line.x})
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.minorticks_off()
    if shown:
        axes.legend(frameon=False, labelcolor=INK, fontsize=9)
    _save(figure, path)


def bars(path: Path, title: str, x_label: str, shown: Sequence[Bars]) -> None:
    """Draw one horizontal bar for each row, the first on top, on a logarithmic axis."""
    figure, axes = _canvas(title, x_label, "")
    places = list(range(len(shown), 0, -1))
    colours = [INK if row.name.startswith("floor") else PALETTE[0] for row in shown]
    axes.barh(places, [row.value for row in shown], color=colours, height=0.6)
    axes.plot([row.mark for row in shown], places, linestyle="none", marker="|", markersize=14, color=PALETTE[1])
    axes.set_xscale("log")
    axes.set_yticks(places, [row.name for row in shown])
    axes.grid(visible=False, axis="y")
    axes.minorticks_off()
    for row, place in zip(shown, places, strict=True):
        axes.text(row.value, place, f" {row.value:,.0f}", color=INK, va="center", fontsize=9)
    _save(figure, path)
