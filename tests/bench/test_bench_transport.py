"""The transport benchmark, run once at its shortest: what it measures, what it writes, and that nothing was lost."""

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest

from llamaherd.transport.messages import encode
from samples import Figure, percentile, summarise, tails
from transport_faults import FAULTS, MERGED
from transport_floors import FLOORS
from transport_report import Report, markdown
from transport_world import PROCESS_TRANSPORTS, TRANSPORTS
from workload import answer, command, load_state

ROOT = Path(__file__).parents[2]
SECONDS = 150

pytestmark = pytest.mark.timeout(SECONDS + 10)


class Ran:
    """The results of one run."""

    def __init__(self, folder: Path, output: str) -> None:
        self.folder = folder
        self.output = output
        self.report = msgspec.json.decode((folder / "transport.json").read_bytes(), type=Report)

    def figures(self, measure: str) -> dict[tuple[str, str], Figure]:
        return {(f.transport, f.variant): f for f in self.report.figures if f.measure == measure}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("bench") / "results"
    program = [sys.executable, str(ROOT / "bench" / "bench_transport.py")]
    done = subprocess.run(
        [*program, "--smoke", "--loops", "uvloop", "--out", str(folder)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return Ran(folder, done.stdout)


def test_the_machine_and_the_versions_come_first(ran: Ran) -> None:
    assert ran.output.startswith("processor: ")
    assert {
        "processor",
        "cores",
        "memory",
        "system",
        "python",
        "commit",
        "pyzmq",
        "libzmq",
    } <= ran.report.machine.keys()


def test_every_transport_and_floor_has_round_trips(ran: Ran) -> None:
    trips = ran.figures("round_trip")
    assert {transport for transport, _ in trips} == {*TRANSPORTS, *(f"floor: {floor}" for floor in FLOORS)}
    for figure in trips.values():
        p50, p99, p999 = (figure.values[f"p{name}_us"].median for name in ("50", "99", "99.9"))
        assert 0 < p50 <= p99 <= p999


def test_every_transport_has_every_measure(ran: Ran) -> None:
    for measure in ("one_way", "throughput", "decode_steps"):
        assert {transport for transport, _ in ran.figures(measure)} >= set(TRANSPORTS), measure
    for measure in ("start_up", "fan_in"):
        assert {transport for transport, _ in ran.figures(measure)} >= set(PROCESS_TRANSPORTS), measure


def test_no_figure_is_negative(ran: Ran) -> None:
    for figure in ran.report.figures:
        for name, spread in figure.values.items():
            if name != "channel_KiB":  # a difference of two readings
                assert 0 <= spread.low <= spread.median <= spread.high, (figure, name)


def test_no_channel_of_ours_loses_anything(ran: Ran) -> None:
    tolls = {(toll.transport, toll.fault): toll for toll in ran.report.faults}
    assert tolls.keys() == {(name, fault) for name in (*PROCESS_TRANSPORTS, *MERGED) for fault in FAULTS}
    for (transport, _), toll in tolls.items():
        assert toll.sent > 0
        assert toll.received + toll.lost == toll.sent or toll.fault == "stall"
        if transport in PROCESS_TRANSPORTS:
            assert (toll.received, toll.lost, toll.torn, toll.forged, toll.again) == (toll.sent, 0, 0, 0, 0), toll


def test_every_target_is_judged(ran: Ran) -> None:
    for target in ran.report.targets:
        assert target.measured is not None or not target.reached
        assert target.name in ran.output


def test_the_report_shows_every_transport_and_its_pictures(ran: Ran) -> None:
    text = (ran.folder / "transport.md").read_text(encoding="utf-8")
    for name in (*TRANSPORTS, *MERGED, *FLOORS):
        assert name in text
    pictures = sorted(ran.folder.glob("*.svg"))
    assert len(pictures) == 5
    for picture in pictures:
        assert f"({picture.name})" in text
        assert ElementTree.parse(picture).getroot().tag.endswith("svg")  # our own file


def test_an_unmeasured_target_is_not_reached(ran: Ran) -> None:
    bare = msgspec.structs.replace(ran.report, figures=[], meaning=[], faults=[])
    assert "not measured" in markdown(bare, [])


def test_a_percentile_is_a_measured_value() -> None:
    assert percentile([1, 2, 3, 4], 0.5) == 2
    assert percentile([1, 2, 3, 4], 0.99) == 4
    assert percentile([7], 0.5) == 7
    assert tails([1000, 3000, 2000]) == {"p50_us": 2, "p99_us": 3, "p99.9_us": 3}


def test_nothing_measured_makes_no_figures() -> None:
    assert summarise([]) == []


def test_the_load_has_the_sizes_that_it_says() -> None:
    assert len(encode(load_state())[1]) == 50
    for size in (50, 64, 1024):
        assert len(encode(command(size))[1]) == len(encode(answer(size))[1]) == size
