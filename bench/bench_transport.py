"""stdout lines, pipes or ZeroMQ? ``python bench/bench_transport.py`` measures them and writes a report.

The method is in README.md beside this file. Each cell runs in a process of its own; the rounds are interleaved, so a
slow spell of the machine hits every transport and not one. The results go to ``bench/results``: ``transport.json``,
``transport.md`` and pictures.
"""

import argparse
import importlib.util
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Final

import msgspec

import machine
import transport_plots
from pinning import want_pinning
from samples import Sample, summarise
from transport_crowd import CrowdTask
from transport_faults import FAULTS, MERGED, FaultTask
from transport_floors import FLOORS, FloorTask
from transport_peer import STATE_SIZE
from transport_report import Report, judge_faults, markdown, meaning, targets
from transport_sitting import Task
from transport_world import PROCESS_TRANSPORTS, TRANSPORTS

__all__ = ["PRESETS", "Preset", "main"]

FORMAT: Final = 1
_FOLDER: Final = Path(__file__).parent
#: No cell lasts longer than this, in seconds; one that does has hung.
_CELL_SECONDS: Final = 120


class Preset(msgspec.Struct, frozen=True):
    """How long everything runs; the fields are documented where the tasks are."""

    rounds: int
    trips: int
    pace_seconds: float
    flows: tuple[tuple[int, int], ...]
    crowds: tuple[int, ...]
    crowd_messages: int
    crowd_rounds: int
    fault_count: int
    fault_seconds: float
    fault_rounds: int
    spawns: int = 1
    together: bool = False  # all cells of a kind in one process
    rates: tuple[int, ...] = (100, 1_000, 10_000)
    trip_sizes: tuple[int, ...] = (STATE_SIZE, 1024)


PRESETS: Final = {
    "full": Preset(
        rounds=5,
        trips=2_000,
        pace_seconds=0.6,
        flows=((64, 10_000), (1024, 8_000), (16 * 1024, 2_000), (128 * 1024, 300), (2**20, 50)),
        crowds=(1, 10, 100, 500),
        crowd_messages=40_000,
        crowd_rounds=3,
        fault_count=5_000,
        fault_seconds=1.0,
        fault_rounds=2,
    ),
    "quick": Preset(
        rounds=2,
        trips=500,
        pace_seconds=0.2,
        flows=((64, 5_000), (1024, 4_000), (16 * 1024, 1_000), (128 * 1024, 150), (2**20, 20)),
        crowds=(1, 10, 100, 500),
        crowd_messages=20_000,
        crowd_rounds=1,
        fault_count=2_000,
        fault_seconds=0.5,
        fault_rounds=1,
    ),
    # Shows that the benchmark itself works, and nothing else.
    "smoke": Preset(
        rounds=1,
        trips=20,
        pace_seconds=0.01,
        flows=((64, 200), (1024, 50)),
        crowds=(6,),
        crowd_messages=300,
        crowd_rounds=1,
        fault_count=200,
        fault_seconds=0.05,
        fault_rounds=1,
        together=True,
        rates=(1_000, 10_000),
    ),
}

#: A program of this folder, and one task for it.
Step = tuple[str, msgspec.Struct]


def sittings(preset: Preset, loops: Sequence[str]) -> Iterator[Step]:
    """Yield one round of every transport on every loop, and of the floors."""
    for floor in FLOORS:
        spawns = preset.spawns if floor == FLOORS[0] else 0
        yield "transport_floors.py", FloorTask(floor, preset.trips, preset.trip_sizes, preset.flows, spawns)
    for transport in TRANSPORTS:
        for loop in loops:
            yield (
                "transport_sitting.py",
                Task(
                    transport=transport,
                    loop=loop,
                    trips=preset.trips,
                    trip_sizes=preset.trip_sizes,
                    rates=preset.rates,
                    pace_seconds=preset.pace_seconds,
                    flows=preset.flows,
                    spawns=preset.spawns if transport in PROCESS_TRANSPORTS else 0,
                ),
            )


def crowds(preset: Preset, loops: Sequence[str]) -> Iterator[Step]:
    """Yield one round of the fan-in."""
    for workers in preset.crowds:
        for transport in PROCESS_TRANSPORTS:
            for loop in loops:
                yield "transport_crowd.py", CrowdTask(transport, loop, workers, preset.crowd_messages)


def faults(preset: Preset, loops: Sequence[str]) -> Iterator[Step]:
    """Yield one round of the faults."""
    for fault in FAULTS:
        for transport in (*PROCESS_TRANSPORTS, *MERGED):
            for loop in ("none",) if transport in MERGED else loops:
                yield (
                    "transport_faults.py",
                    FaultTask(transport, loop, fault, preset.fault_count, preset.fault_seconds),
                )


def schedule(preset: Preset, loops: Sequence[str]) -> Iterator[Step]:
    """Yield all steps of all rounds, interleaved."""
    for number in range(max(preset.rounds, preset.crowd_rounds, preset.fault_rounds)):
        if number < preset.rounds:
            yield from sittings(preset, loops)
        if number < preset.crowd_rounds:
            yield from crowds(preset, loops)
        if number < preset.fault_rounds:
            yield from faults(preset, loops)


def measure(program: str, tasks: Sequence[msgspec.Struct]) -> list[Sample]:
    """Run tasks in a fresh process. Raises RuntimeError if it fails or hangs."""
    words = [msgspec.json.encode(task).decode() for task in tasks]
    command = [sys.executable, str(_FOLDER / program), *words]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, timeout=_CELL_SECONDS)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{program} did not end within {_CELL_SECONDS} s: {words}") from None
    if done.returncode:
        raise RuntimeError(f"{program} ended with exit code {done.returncode}: {words}")
    return msgspec.json.decode(done.stdout, type=list[Sample])


def measure_all(preset: Preset, loops: Sequence[str]) -> list[Sample]:
    """Run everything and say how far it is."""
    steps = list(schedule(preset, loops))
    samples: list[Sample] = []
    began = time.monotonic()
    if preset.together:
        for program, group in groupby(steps, key=itemgetter(0)):
            samples += measure(program, [task for _, task in group])
        return samples
    for place, (program, task) in enumerate(steps, 1):
        samples += measure(program, [task])
        if place % 20 == 0 or place == len(steps):
            print(f"{place}/{len(steps)} cells, {time.monotonic() - began:.0f} s", flush=True)
    return samples


def write(folder: Path, report: Report, loop: str) -> None:
    """Write the result file, the pictures and the report."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "transport.json").write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    pictures = transport_plots.draw(folder, report.figures, loop)
    (folder / "transport.md").write_text(markdown(report, pictures), encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the transports and write a report.")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_const", const="quick", dest="preset", help="two to three minutes")
    length.add_argument(
        "--smoke", action="store_const", const="smoke", dest="preset", help="seconds; checks only the benchmark itself"
    )
    both = "asyncio,uvloop" if importlib.util.find_spec("uvloop") else "asyncio"
    parser.add_argument("--loops", default=both, help="asyncio, uvloop or both with a comma (default: %(default)s)")
    parser.add_argument("--pin", action="store_true", help="pool's side on the first core, workers on the others")
    parser.add_argument("--out", type=Path, default=_FOLDER / "results", help="folder for the results")
    arguments = parser.parse_args()
    unknown = set(arguments.loops.split(",")) - {"asyncio", "uvloop"}
    if unknown:
        parser.error(f"unknown loop {sorted(unknown)[0]!r}")
    return arguments


def _command(preset: str, *, pinned: bool) -> str:
    options = ("" if preset == "full" else f" --{preset}") + (" --pin" if pinned else "")
    return f"python bench/bench_transport.py{options}"


def main() -> None:
    """Measure what the command line asks for."""
    arguments = _arguments()
    name: str = arguments.preset or "full"
    preset = PRESETS[name]
    loops: list[str] = arguments.loops.split(",")
    where = machine.describe()
    if arguments.pin:
        where["pinned"] = want_pinning()
    for fact, value in where.items():
        print(f"{fact}: {value}")
    began = time.monotonic()
    samples = measure_all(preset, loops)
    figures = summarise(sample for sample in samples if sample.measure != "fault")
    loop = "uvloop" if "uvloop" in loops else loops[0]
    report = Report(
        format=FORMAT,
        when=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        seconds=time.monotonic() - began,
        command=_command(name, pinned=arguments.pin),
        preset=name,
        machine=where,
        settings={"loops": loops, **msgspec.structs.asdict(preset)},
        figures=figures,
        faults=judge_faults(samples),
        targets=targets(figures, loop),
        meaning=meaning(figures),
    )
    write(arguments.out, report, loop)
    for target in report.targets:
        measured = "-" if target.measured is None else f"{target.measured:,.2f}"
        print(f"{'reached    ' if target.reached else 'not reached'}  {target.name}: {measured} ({target.wanted})")
    print(f"{report.seconds:.0f} s; the report is {arguments.out / 'transport.md'}")


if __name__ == "__main__":
    main()
