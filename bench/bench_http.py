"""Measures the front end: what it adds to a request, beside llama-server's router, and how much it carries.

    python bench/bench_http.py [--llama-server PATH] [--rounds N] [--only front,router,crowd,pace,limit] [--quick]

Method. The server is a process of its own (`http_subject.py`: pool and front end on one uvloop), its workers are
processes as always, and this process is the clients. What goes without HTTP is asked of the same pool in the same
process. All ways are measured in every round, one after the other, so that what else the machine does falls on all of
them; the first round of each warms up and is not counted. Figures are medians of the rounds with the least and the
greatest beside them.

* front: completions of one token by a scripted engine, one client at a time: through the front end, and by the pool
  alone. The client's own time is in the former.
* router: completions of one token by the demo model with a cached prompt, at 1, 8 and 64 clients: through the front end
  and by the pool alone; llama-server's router and the same llama-server straight. Overhead is the difference of the
  median durations of one round. All four run all the time; those that are not asked are idle.
* crowd: 1,000 idle subscribers of `/models/sse`, and 200 streams of scripted engines, eight models with a step every
  50 ms. Added delay is the time between two tokens, above a step, as a client sees it.
* pace: 64 streams of one scripted engine that makes somewhat more than 20,000 tokens a second, by the pool alone and
  through the front end, on each transport: what arrives, and how much of one core the server takes for it.
* limit: the same with an engine that does not wait; and the processor time that the server spends on a token.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import uvloop

from http_clients import Connection, closed_loop, subscribe
from llamaherd.pool import find_model
from machine import describe
from samples import percentile
from servers import Server, running

__all__ = ["main"]

TRANSPORTS: Final = ("pipe", "zmq", "stdio")
PROMPT: Final = "Write a long story about a llama that crosses the mountains."
STEP: Final = 0.05
STREAMS: Final = 64
PARTS: Final = ("front", "router", "crowd", "pace", "limit")
#: Tokens a second that must go through, and that the engine is told to make: its steps take a little longer than told.
RATE: Final = 20_000
TOLD_RATE: Final = 23_000

Row = dict[str, float]


class Subject:
    """The server under test; see ``http_subject.py``."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.url: str = self._read()["url"]

    def order(self, **order: Any) -> dict[str, Any]:
        """Have it do something, and return its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the server ended"
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def subject(**settings: Any) -> Generator[Subject]:
    """Start a server, and stop it."""
    command = [sys.executable, "-P", str(Path(__file__).with_name("http_subject.py")), json.dumps(settings)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Subject(process)
        assert process.stdin is not None
        process.stdin.close()
        process.wait(60)


def run(work: Any) -> Any:
    """Run a coroutine on a fresh uvloop."""
    return uvloop.run(work)


def tails(durations: list[int]) -> Row:
    """Return the median and the 99th percentile of nanoseconds, in milliseconds."""
    ordered = sorted(duration / 1e6 for duration in durations)
    return {"p50": percentile(ordered, 0.5), "p99": percentile(ordered, 0.99)}


def middle(rounds: list[Row]) -> dict[str, list[float]]:
    """Return the median, the least and the greatest of every figure over the rounds after the first."""
    counted = rounds[1:] or rounds
    columns = {name: [row[name] for row in counted] for name in counted[0]}
    return {name: [statistics.median(values), min(values), max(values)] for name, values in columns.items()}


# --- front ------------------------------------------------------------------------------------------------------------


def measure_front(rounds: int, requests: int) -> dict[str, Any]:
    """Compare one-token requests through the front end with those by the pool alone."""
    rows: list[Row] = []
    body = {"model": "m0", "prompt": "one", "max_tokens": 1}
    with subject(transport="pipe", models=1, slots=4, script={"pieces": ["x"]}) as server:
        for _ in range(rounds + 1):
            alone = server.order(do="pool", models=1, clients=1, requests=requests, prompt="one", max_tokens=1)
            through = run(closed_loop(server.url, 1, requests, [body]))
            ours, pool = tails(through["durations"]), tails(alone["durations"])
            rows.append(
                {
                    "pool p50 ms": pool["p50"],
                    "pool p99 ms": pool["p99"],
                    "front end p50 ms": ours["p50"],
                    "front end p99 ms": ours["p99"],
                    "added p50 ms": ours["p50"] - pool["p50"],
                    "added p99 ms": ours["p99"] - pool["p99"],
                }
            )
    return {"one client": middle(rows)}


# --- router -----------------------------------------------------------------------------------------------------------


def measure_router(llama_server: str, rounds: int, requests: int) -> dict[str, Any]:
    """Compare both servers with their engines, at several numbers of clients."""
    path = str(find_model("demo").path)
    common = ["-c", "4096", "-np", "4"]
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        (Path(folder) / "m0.gguf").symlink_to(path)
        ours = stack.enter_context(subject(transport="pipe", slots=4, file=path))
        theirs: list[Server] = []
        if llama_server:
            theirs.append(stack.enter_context(running([llama_server, "-m", path, *common], "direct")))
            theirs.append(stack.enter_context(running([llama_server, "--models-dir", folder, *common], "router")))
        answers: dict[str, Any] = {}
        for clients in (1, 8, 64):
            each = max(1, requests // clients)
            rows = [_router_round(ours, theirs, clients, each) for _ in range(rounds + 1)]
            answers[f"{clients} clients"] = middle(rows)
    return answers


def _router_round(ours: Subject, theirs: list[Server], clients: int, each: int) -> Row:
    body = {"model": "m0", "prompt": PROMPT, "max_tokens": 1, "temperature": 0, "cache_prompt": True}
    alone = ours.order(do="pool", models=1, clients=clients, requests=each, prompt=PROMPT, max_tokens=1)
    through = run(closed_loop(ours.url, clients, each, [body]))
    row = _pair("ours", alone["durations"], through["durations"])
    if theirs:
        straight, routed = (_reference(server.port, clients, each, body) for server in theirs)
        row |= _pair("llama-server", straight, routed)
    print(f"router, {clients} clients: {json.dumps(row)}", flush=True)
    return row


def _reference(port: int, clients: int, each: int, body: dict[str, Any]) -> list[int]:
    url = f"http://127.0.0.1:{port}"
    run(closed_loop(url, 1, 2, [body]))  # loads the model
    durations: list[int] = run(closed_loop(url, clients, each, [body]))["durations"]
    return durations


def _pair(side: str, straight: list[int], routed: list[int]) -> Row:
    before, after = tails(straight), tails(routed)
    return {
        f"{side}: straight p50 ms": before["p50"],
        f"{side}: routed p50 ms": after["p50"],
        f"{side}: added p50 ms": after["p50"] - before["p50"],
        f"{side}: added p99 ms": after["p99"] - before["p99"],
    }


# --- crowd ------------------------------------------------------------------------------------------------------------


def measure_crowd(rounds: int, listeners: int, streams: int, tokens: int) -> dict[str, Any]:
    """Have many listen and many stream, and look for loss and delay."""
    rows: list[Row] = []
    models = 8
    slots = -(-streams // models)
    script = {"pieces": ["word "], "repeat": tokens, "step_seconds": STEP}
    with subject(transport="pipe", models=models, slots=slots, script=script) as server:
        for _ in range(rounds + 1):
            rows.append(run(_crowd(server, listeners, streams, models, tokens)))
    return {f"{listeners} listeners, {streams} streams": middle(rows)}


async def _crowd(server: Subject, listeners: int, streams: int, models: int, tokens: int) -> Row:
    before = server.order(do="usage")
    idle = await subscribe(server.url, listeners)
    after = server.order(do="usage")
    connections = [await Connection(server.url).open() for _ in range(streams)]
    reads = await asyncio.gather(
        *(
            connection.stream("/v1/completions", {"model": f"m{number % models}", "prompt": "x", "stream": True})
            for number, connection in enumerate(connections)
        )
    )
    spent = server.order(do="usage")
    for connection in (*connections, *idle):
        connection.close()
    # The last two events of a stream are its end and [DONE].
    received = sum(count for one in reads for _, count in one) - 2 * streams
    gaps = sorted((later - earlier) / 1e6 for one in reads for (earlier, _), (later, _) in pairwise(one[:-1]))
    return {
        "tokens lost": streams * tokens - received,
        "added delay p50 ms": percentile(gaps, 0.5) - STEP * 1e3,
        "added delay p99 ms": percentile(gaps, 0.99) - STEP * 1e3,
        "kB per idle listener": (after["rss"] - before["rss"]) / listeners / 1e3,
        "server µs per token": (spent["cpu"] - after["cpu"]) / received * 1e6,
    }


# --- pace and limit -------------------------------------------------------------------------------------------------


def measure_pace(rounds: int, tokens: int) -> dict[str, Any]:
    """Have an engine make 20,000 tokens a second, and see what arrives, on each transport."""
    return _on_every_transport(rounds, tokens, STREAMS / TOLD_RATE)


def measure_limit(rounds: int, tokens: int) -> dict[str, Any]:
    """Find how many tokens a second go through, on each transport."""
    return _on_every_transport(rounds, tokens, 0.0)


def _on_every_transport(rounds: int, tokens: int, step: float) -> dict[str, Any]:
    answers: dict[str, Any] = {}
    for transport in TRANSPORTS:
        script = {"pieces": ["word "], "repeat": tokens, "step_seconds": step}
        with subject(transport=transport, models=1, slots=STREAMS, script=script) as server:
            answers[transport] = middle([_flood_round(server, tokens) for _ in range(rounds + 1)])
    return answers


def _flood_round(server: Subject, tokens: int) -> Row:
    alone = server.order(do="pool", models=1, clients=STREAMS, requests=1, prompt="x", max_tokens=-1)
    before = server.order(do="usage")
    seconds: float = run(_flood(server.url))
    spent = server.order(do="usage")["cpu"] - before["cpu"]
    count = STREAMS * tokens
    return {
        "pool tokens/s": alone["tokens"] / alone["seconds"],
        "pool µs per token": alone["cpu"] / alone["tokens"] * 1e6,
        "front end tokens/s": count / seconds,
        "front end µs per token": spent / count * 1e6,
        "front end % of a core": spent / seconds * 100,
        "front end tokens/s, share of the pool's": count / seconds * alone["seconds"] / alone["tokens"],
    }


async def _flood(url: str) -> float:
    connections = [await Connection(url).open() for _ in range(STREAMS)]
    body = {"model": "m0", "prompt": "x", "stream": True}
    loop = asyncio.get_running_loop()
    began = loop.time()
    await asyncio.gather(*(connection.stream("/v1/completions", body) for connection in connections))
    seconds = loop.time() - began
    for connection in connections:
        connection.close()
    return seconds


# --- report -----------------------------------------------------------------------------------------------------------


def targets(results: dict[str, Any]) -> list[tuple[str, float, str]]:
    """Return what was promised: each with its median and what is wanted."""
    rows: list[tuple[str, float, str]] = []

    def row(what: str, part: str, case: str, figure: str, wanted: str) -> None:
        figures = results.get(part, {}).get(case, {})
        if figure in figures:
            rows.append((what, figures[figure][0], wanted))

    row("added to a request, p50, ms", "front", "one client", "added p50 ms", "<= 1")
    row("added to a request, p99, ms", "front", "one client", "added p99 ms", "<= 4")
    for case, figures in results.get("router", {}).items():
        theirs = figures.get("llama-server: added p50 ms")
        wanted = "" if theirs is None else f"<= {theirs[0]:.2f}, the reference's"
        row(f"router overhead, {case}, p50, ms", "router", case, "ours: added p50 ms", wanted)
    for case in results.get("crowd", {}):
        row("crowd: tokens lost", "crowd", case, "tokens lost", "0")
        row("crowd: added between tokens, p99, ms", "crowd", case, "added delay p99 ms", "< 20")
        row("crowd: kB per idle stream", "crowd", case, "kB per idle listener", "< 60")
    for case in results.get("pace", {}):
        row(f"{case}: tokens/s that arrive", "pace", case, "front end tokens/s", f">= {RATE:,}")
        row(f"{case}: % of a core for that", "pace", case, "front end % of a core", "< 100")
    for case in results.get("limit", {}):
        row(f"{case}: most tokens/s", "limit", case, "front end tokens/s", f">= {RATE:,}")
    return rows


def report(results: dict[str, Any]) -> str:
    """Return the results as Markdown, method first."""
    method = (__doc__ or "").split("Method. ")[1].strip()
    machine = "; ".join(f"{name} {value}" for name, value in results["machine"].items())
    lines = ["# The front end", "", method, "", f"Machine: {machine}.", ""]
    lines += ["## Targets", "", "| what | measured | wanted |", "|---|--:|--:|"]
    lines += [f"| {what} | {value:,.2f} | {wanted} |" for what, value, wanted in targets(results)]
    lines.append("")
    for part in PARTS:
        for case, figures in results.get(part, {}).items():
            lines += [f"## {part}: {case}", "", "| figure | median | least | greatest |", "|---|--:|--:|--:|"]
            lines += [
                f"| {name} | {' | '.join(f'{value:,.3g}' if value < 1000 else f'{value:,.0f}' for value in row)} |"
                for name, row in figures.items()
            ]
            lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Run the parts that are asked for, print the report and write it."""
    parser = argparse.ArgumentParser(description="Measure the front end.")
    parser.add_argument("--llama-server", default="", help="path of the reference; without it only this project")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="two rounds and small counts: shows that it works")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    quick: bool = arguments.quick
    rounds: int = 1 if quick else arguments.rounds
    parts: dict[str, Callable[[], Any]] = {
        "front": lambda: measure_front(rounds, 200 if quick else 2_000),
        "router": lambda: measure_router(arguments.llama_server, rounds, 64 if quick else 256),
        "crowd": lambda: measure_crowd(rounds, *((50, 20, 40) if quick else (1_000, 200, 150))),
        "pace": lambda: measure_pace(rounds, 200 if quick else 1_000),
        "limit": lambda: measure_limit(rounds, 200 if quick else 2_000),
    }
    results: dict[str, Any] = {"machine": describe()}
    for part in arguments.only.split(","):
        results[part] = parts[part]()
        print(f"{part}: {json.dumps(results[part])}", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "http.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    (arguments.out / "http.md").write_text(report(results))
    print(report(results))


if __name__ == "__main__":
    main()
