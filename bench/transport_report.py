"""From figures to a report: the targets, what the figures mean, and the tables in Markdown."""

from collections.abc import Callable, Iterable, Sequence
from typing import Final

import msgspec

from samples import Figure, Key, Sample, Spread
from transport_faults import FAULTS, LATE_MS, MERGED
from transport_world import PROCESS_TRANSPORTS, TRANSPORTS
from workload import SEQUENCES

__all__ = ["Report", "Share", "Target", "Toll", "judge_faults", "markdown", "meaning", "targets"]

STATE: Final = "state, 50 B"
#: (milliseconds of a decode step, the measured rate nearest to that many steps a second)
STEPS: Final = ((7, "100/s"), (2, "1000/s"))


class Target(msgspec.Struct, frozen=True):
    """One aim, what was measured, and whether it was reached; ``measured`` is None if this run did not measure it."""

    name: str
    wanted: str
    measured: float | None
    reached: bool


class Toll(msgspec.Struct, frozen=True):
    """What one transport did under one fault, over all runs."""

    transport: str
    fault: str
    runs: int
    sent: int
    received: int
    lost: int
    torn: int
    forged: int
    again: int
    late: int
    worst_ms: float


class Share(msgspec.Struct, frozen=True):
    """What the figures of one transport mean on one loop.

    Attributes:
        worker_tokens_per_s: From one worker that does nothing but send.
        core_tokens_per_s: What one core of the pool's process takes from a crowd of workers.
        step_shares: Milliseconds of a decode step -> (share of it that the engine's thread spends in ``send``, share
            that is the pool's processor time).
    """

    transport: str
    loop: str
    worker_tokens_per_s: float
    core_tokens_per_s: float | None
    step_shares: dict[str, tuple[float, float]]


class Report(msgspec.Struct, frozen=True):
    """The result file."""

    format: int
    when: str
    seconds: float
    command: str
    preset: str
    machine: dict[str, str]
    settings: dict[str, object]
    figures: list[Figure]
    faults: list[Toll]
    targets: list[Target]
    meaning: list[Share]


class Index:
    """Finds figures by their key."""

    def __init__(self, figures: Iterable[Figure]) -> None:
        self._figures: dict[Key, Figure] = {(f.measure, f.transport, f.loop, f.variant): f for f in figures}

    def find(self, measure: str, transport: str, loop: str, variant: str, name: str) -> Spread | None:
        figure = self._figures.get((measure, transport, loop, variant))
        return figure.values.get(name) if figure else None

    def rows(self, measure: str) -> list[tuple[str, str]]:
        """Return the (transport, loop) pairs of a measure: the transports in their order, then the floors."""
        found = list(dict.fromkeys((t, loop) for m, t, loop, _ in self._figures if m == measure))
        order = {name: place for place, name in enumerate(TRANSPORTS)}
        return sorted(found, key=lambda row: (row[1], order.get(row[0], len(order))) if row[1] != "none" else ("~", 0))

    def variants(self, measure: str) -> list[str]:
        return list(dict.fromkeys(v for m, _, _, v in self._figures if m == measure))


# --- judgements -------------------------------------------------------------------------------------------------------


def targets(figures: Sequence[Figure], loop: str) -> list[Target]:
    """Compare the figures of one loop with the aims."""
    index = Index(figures)

    def median(measure: str, transport: str, variant: str, name: str) -> float | None:
        spread = index.find(measure, transport, "none" if transport.startswith("floor") else loop, variant, name)
        return spread.median if spread else None

    def ratio(over: float | None, under: float | None) -> float | None:
        return None if over is None or not under else over / under

    def at_most(name: str, measured: float | None, limit: float) -> Target:
        return Target(name, f"at most {limit:g}", measured, measured is not None and measured <= limit)

    def at_least(name: str, measured: float | None, limit: float) -> Target:
        return Target(name, f"at least {limit:,.0f}", measured, measured is not None and measured >= limit)

    def trip(transport: str) -> float | None:
        return median("round_trip", transport, STATE, "p50_us")

    def flow(variant: str) -> float | None:
        return median("throughput", "pipe", variant, "messages_per_s")

    few, many = (median("fan_in", "pipe", f"{n} workers", "pool_cpu_us") for n in (10, 500))
    return [
        at_most(
            "pipe round trip / blocking socketpair round trip", ratio(trip("pipe"), trip("floor: socketpair")), 1.5
        ),
        at_most("stdio round trip / pipe round trip", ratio(trip("stdio"), trip("pipe")), 1.3),
        at_most(
            "zmq ipc round trip / blocking PAIR-PAIR ipc", ratio(trip("zmq-ipc"), trip("floor: zmq PAIR ipc")), 1.5
        ),
        at_least("pipe, 64 B, pool to worker, batched, messages/s", flow("64 B down, batched"), 300_000),
        at_least("pipe, 64 B, pool to worker, unbatched, messages/s", flow("64 B down, unbatched"), 60_000),
        at_least("pipe, 64 B, worker to pool, one write each, messages/s", flow("64 B up"), 60_000),
        at_least(
            "pipe, fan-in of 100 workers, messages/s",
            median("fan_in", "pipe", "100 workers", "messages_per_s"),
            100_000,
        ),
        at_most("pipe, pool's cost of a message, 500 workers / 10 workers", ratio(many, few), 1.2),
    ]


def judge_faults(samples: Iterable[Sample]) -> list[Toll]:
    """Add up the runs of each transport and fault, whatever the loop."""
    runs: dict[tuple[str, str], list[dict[str, float]]] = {}
    for sample in samples:
        if sample.measure == "fault":
            runs.setdefault((sample.transport, sample.variant), []).append(sample.values)
    tolls: list[Toll] = []
    for fault in FAULTS:
        for transport in (*PROCESS_TRANSPORTS, *MERGED):
            if values := runs.get((transport, fault)):
                names = ("sent", "received", "lost", "torn", "forged", "again", "late")
                sums = {name: round(sum(run[name] for run in values)) for name in names}
                worst_ms = max(run["worst_ms"] for run in values)
                tolls.append(Toll(transport, fault, len(values), **sums, worst_ms=worst_ms))
    return tolls


def meaning(figures: Sequence[Figure]) -> list[Share]:
    """Compute tokens a second and shares of a decode step."""
    index = Index(figures)
    shares: list[Share] = []
    for transport, loop in index.rows("decode_steps"):
        rate = index.find("decode_steps", transport, loop, f"{SEQUENCES} sequences", "tokens_per_s")
        if rate is None:
            continue
        crowds = [v for v in index.variants("fan_in") if index.find("fan_in", transport, loop, v, "pool_cpu_us")]
        crowd = "100 workers" if "100 workers" in crowds else crowds[-1] if crowds else ""
        cost = index.find("fan_in", transport, loop, crowd, "pool_cpu_us")
        steps: dict[str, tuple[float, float]] = {}
        for step_ms, variant in STEPS:
            send = index.find("one_way", transport, loop, variant, "send_us")
            pool = index.find("one_way", transport, loop, variant, "pool_cpu_us")
            if send and pool:
                steps[str(step_ms)] = (send.median / step_ms / 1000, pool.median / step_ms / 1000)
        core = 1e6 / cost.median * SEQUENCES if cost else None
        shares.append(Share(transport, loop, rate.median, core, steps))
    return shares


# --- Markdown ---------------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Return three digits that matter, with thousands apart."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2g}" if abs(value) < 1 else f"{value:.2f}"


def spread_cell(spread: Spread | None) -> str:
    if spread is None:
        return "–"
    if spread.rounds == 1 or number(spread.low) == number(spread.high):
        return number(spread.median)
    return f"{number(spread.median)} ({number(spread.low)}–{number(spread.high)})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 2) -> str:
    """Return a Markdown table whose first ``words`` columns are text and the rest figures."""
    rule = ["---"] * words + ["--:"] * (len(head) - words)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def _by_variant(index: Index, measure: str, name: str, keep: Callable[[str], bool] = bool) -> str:
    """Return a table with a row for each transport and loop and a column for each variant, of one value."""
    variants = [variant for variant in index.variants(measure) if keep(variant)]
    rows = [(row, [index.find(measure, *row, variant, name) for variant in variants]) for row in index.rows(measure)]
    shown = [(row[0], row[1], *map(spread_cell, cells)) for row, cells in rows if any(cells)]
    return table(("transport", "loop", *variants), shown)


def _by_name(index: Index, measure: str, variant: str, names: Sequence[str]) -> str:
    """Return a table with a row for each transport and loop and a column for each value, of one variant."""
    rows = [(row, [index.find(measure, *row, variant, name) for name in names]) for row in index.rows(measure)]
    head = [name.replace("_per_s", "/s").replace("_", " ").replace("us", "µs") for name in names]
    return table(("transport", "loop", *head), [(*row, *map(spread_cell, cells)) for row, cells in rows if any(cells)])


def markdown(report: Report, plots: Sequence[tuple[str, str]]) -> str:
    """Return the report; ``plots`` are (title, file name)."""
    index = Index(report.figures)
    parts = [
        "# Transports, measured",
        f"Made by `{report.command}` on {report.when}, in {report.seconds:.0f} s. Method, and how to repeat it: "
        "[bench/README.md](../README.md).",
        *([] if report.preset == "full" else [f"**This was a {report.preset} run: too short for conclusions.**"]),
        "A cell shows the median of the rounds, and the least and the greatest round in brackets.",
        "## Machine",
        table(("", ""), report.machine.items()),
        "Settings: `" + msgspec.json.encode(report.settings).decode() + "`",
        "## Targets",
        table(
            ("target", "wanted", "measured", ""),
            [
                (t.name, t.wanted, "–" if t.measured is None else number(t.measured), _verdict(t))
                for t in report.targets
            ],
            words=4,
        ),
        "## What it means",
        _meaning(report.meaning),
        *_figures(index),
        "## Robustness",
        _faults(report.faults),
        "## Pictures",
        *(f"![{title}]({name})" for title, name in plots),
    ]
    return "\n\n".join(parts) + "\n"


def _verdict(target: Target) -> str:
    if target.measured is None:
        return "not measured"
    return "reached" if target.reached else "**not reached**"


def _meaning(shares: Iterable[Share]) -> str:
    def percent(share: float) -> str:
        return f"{share:.2%}"

    rows: list[Sequence[str]] = []
    for share in shares:
        steps = [share.step_shares.get(str(step)) for step, _ in STEPS]
        cells = [" / ".join(map(percent, step)) if step else "–" for step in steps]
        core = "–" if share.core_tokens_per_s is None else number(share.core_tokens_per_s)
        rows.append((share.transport, share.loop, number(share.worker_tokens_per_s), core, *cells))
    head = ("transport", "loop", "tokens/s, one worker", "tokens/s, one core of the pool")
    text = (
        f"A decode step of {SEQUENCES} sequences is one message. The first column is one worker that does nothing but "
        "send; the second is what one core of the pool's process takes from a crowd (its processor time for a message, "
        "turned over). The last columns are shares of a decode step: the time that the engine's thread spends in "
        "`send`, and the pool's processor time."
    )
    return text + "\n\n" + table((*head, *(f"share of a {step} ms step" for step, _ in STEPS)), rows)


def _figures(index: Index) -> list[str]:
    tails = ("p50_us", "p99_us", "p99.9_us", "pool_cpu_us", "worker_cpu_us")
    parts = ["## Round trip"]
    for variant in index.variants("round_trip"):
        parts += [f"### {variant}", _by_name(index, "round_trip", variant, tails)]
    parts.append("## One-way delay of decode steps, worker to pool")
    for variant in index.variants("one_way"):
        parts += [f"### {variant}", _by_name(index, "one_way", variant, (*tails, "send_us"))]
    parts += [
        "## Throughput",
        "### Messages/s, worker to pool",
        _by_variant(index, "throughput", "messages_per_s", lambda variant: variant.endswith("up")),
        "### MB/s, worker to pool",
        _by_variant(index, "throughput", "MB_per_s", lambda variant: variant.endswith("up")),
        "### Messages/s, pool to worker",
        _by_variant(index, "throughput", "messages_per_s", lambda variant: "down" in variant),
        "### Processor time of the pool for a message, µs",
        _by_variant(index, "throughput", "pool_cpu_us"),
        "### Processor time of the worker for a message, µs",
        _by_variant(index, "throughput", "worker_cpu_us"),
        "## Start-up of a worker",
        _by_name(index, "start_up", "one worker", ("first_message_ms", "channel_us", "connect_us")),
        "## Fan-in",
        "### Messages/s",
        _by_variant(index, "fan_in", "messages_per_s"),
        "### Processor time of the pool for a message, µs",
        _by_variant(index, "fan_in", "pool_cpu_us"),
        "### Memory of the pool for a channel, KiB",
        _by_variant(index, "fan_in", "channel_KiB"),
    ]
    return parts


def _faults(tolls: Iterable[Toll]) -> str:
    names = ("sent", "received", "lost", "torn", "forged", "late")
    rows = [
        (toll.fault, toll.transport, *(f"{getattr(toll, name):,}" for name in names), number(toll.worst_ms))
        for toll in tolls
    ]
    text = (
        "All runs added up. *Torn*: began as a record and was none. *Forged*: taken for a record, but nobody sent it. "
        f"*Late*: arrived more than {LATE_MS} ms after it should have been sent; a busy reader makes messages late on "
        "every transport, and the question is what is lost. In *stall* the columns up to *lost* count commands to the "
        "worker that does not read, and *late* and *worst* are the states of its neighbour (*merged* has none there)."
    )
    return text + "\n\n" + table(("fault", "transport", *names, "worst ms"), rows)
