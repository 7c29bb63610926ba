"""Measures the pool: swaps, several busy models, and many workers; beside llama-server's router where it has the same.

    python bench/bench_pool.py [--llama-server PATH] [--rounds N] [--only swap,busy,herd] [--out bench/results]

Method. Both servers run as separate processes with the same model file (the demo model under two names), the same
flags and default threads, and are driven over HTTP by this process with streaming requests. Rounds of all sides are
interleaved, so that what else the machine does falls on all of them; the first round of each warms up and is not
counted. Figures are medians with the quartiles beside them, ratios are ratios of medians.

* swap: model A is loaded; the time from sending a request for B to its first piece of text, with room for one model.
  Ours has A's process take B. With a spare and a memory budget, which is the server's default, B was loaded ahead in
  the two seconds between two requests; without a budget nothing is, and the spare waits for a load into free room.
  Our server runs from an environment made for this, in which the project is installed from a wheel (``--here``: from
  where this program runs): a process of an editable install starts more slowly.
* busy: generated tokens per second, all streams together, 4 streams on one model and 2 + 2 on two models at once.
* herd: workers with the scripted engine; requests per second through one manager with 64 at once, its CPU time while
  idle, its memory per worker, and the time from a worker's state message to a listener. Then its CPU time per request
  in three loads (64 and 10 at once over all workers, 10 over ten of them), the least of some rounds, with what that
  time depends on: turns of the loop, reads, and messages that they brought. Where several messages share a read, as
  when 64 requests meet 10 workers, a request is cheaper; only rows with as many reads compare the sizes of herds.

llama-server is built from the llama-cpp-python source package, so that both sides run the same ggml; see
bench/README.md.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from installed import installed
from llamaherd.pool import find_model
from pool_herd import herd_tables, measure_herd
from samples import summary
from servers import Server, our_command, running

__all__ = ["main", "running"]

PROMPT: Final = "Write a long story about a llama that crosses the mountains."
NAMES: Final = ("alpha", "beta")


# --- servers ----------------------------------------------------------------------------------------------------------


def pieces(server: Server, model: str, max_tokens: int) -> Iterator[float]:
    """Yield the time at which each piece of text arrives."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": False,
    }
    for when, event in server.events("/v1/chat/completions", body):
        if event["choices"] and event["choices"][0]["delta"].get("content"):
            yield when


def first_piece(server: Server, model: str) -> float:
    """Return the seconds from the request to the first piece of text, and let the answer end."""
    began = time.perf_counter()
    times = list(pieces(server, model, 2))
    return times[0] - began


def commands(models: Path, llama_server: str, models_max: int, python: str = sys.executable) -> dict[str, list[str]]:
    """Return the command lines of the sides to compare."""
    common = ["--models-dir", str(models), "--models-max", str(models_max), "-c", "4096", "-np", "4"]
    ours = our_command(*common, python=python)
    sides = {
        "llamaherd": ours,
        "llamaherd --spare": [*ours, "--spare"],
        "llamaherd --spare, no budget": [*ours, "--spare", "--memory-budget", "0"],
    }
    if llama_server:
        sides["llama-server"] = [llama_server, *common]
    return sides


# --- swap -------------------------------------------------------------------------------------------------------------


def measure_swap(models: Path, llama_server: str, rounds: int, *, here: bool) -> dict[str, Any]:
    """Alternate between two models with room for one; the figures are seconds to the first piece after a swap."""
    samples: dict[str, list[float]] = {}
    with ExitStack() as stack:
        python = sys.executable if here else stack.enter_context(installed())
        sides = [
            stack.enter_context(running(command, name))
            for name, command in commands(models, llama_server, 1, python).items()
        ]
        for server in sides:
            first_piece(server, NAMES[0])
        for number in range(1, 2 * rounds + 3):
            for server in sides:
                seconds = first_piece(server, NAMES[number % 2])
                if number > 2:
                    samples.setdefault(server.name, []).append(seconds)
                time.sleep(2.0)  # the spare, which is started some time after a load, is to be ready again
    return {name: summary(values, 1e3) for name, values in samples.items()}


# --- busy -------------------------------------------------------------------------------------------------------------


def tokens_per_second(server: Server, models: Sequence[str], max_tokens: int) -> float:
    """Run one stream per entry of ``models`` at the same time and return all pieces per second of wall time."""
    counts = [0] * len(models)

    def run(index: int) -> None:
        counts[index] = sum(1 for _ in pieces(server, models[index], max_tokens))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(models))]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - began)


def measure_busy(models: Path, llama_server: str, rounds: int, max_tokens: int) -> dict[str, Any]:
    """Compare four streams on one model with two on each of two models."""
    samples: dict[str, list[float]] = {}
    with ExitStack() as stack:
        sides = [
            stack.enter_context(running(command, name))
            for name, command in commands(models, llama_server, 2).items()
            if "--spare" not in name
        ]
        loads = {"one": [NAMES[0]] * 4, "two": [NAMES[0], NAMES[1]] * 2}
        for server in sides:
            tokens_per_second(server, NAMES, 4)
        for _ in range(rounds):
            for server in sides:
                for load, streams in loads.items():
                    # The reference may need minutes for what is a matter of seconds: fewer tokens tell as much.
                    tokens = max_tokens if server.name == "llamaherd" or load == "one" else max(8, max_tokens // 8)
                    samples.setdefault(f"{server.name}, {load}", []).append(tokens_per_second(server, streams, tokens))
    return {name: summary(values, 1.0) for name, values in samples.items()}


# --- report -----------------------------------------------------------------------------------------------------------


def tables(results: Mapping[str, Any], parts: Iterable[str]) -> list[str]:
    """Return the lines of a table for each part that was measured: every figure by its name."""
    lines: list[str] = []
    for part in parts:
        if part in results:
            lines += ["", f"## {part}", "", "| what | median | quartiles | n |", "|---|--:|--:|--:|"]
            lines += [
                f"| {name} | {row['median']:,.1f} | {row['q1']:,.1f} to {row['q3']:,.1f} | {row['n']} |"
                for name, row in results[part].items()
            ]
    return lines


def report(results: dict[str, Any]) -> str:
    """Return the results as Markdown, method first."""
    lines = ["# The pool", "", (__doc__ or "").split("Method. ")[1].strip(), "", f"Machine: {results['machine']}", ""]
    for part, unit in (("swap", "ms to the first piece"), ("busy", "tokens per second")):
        if part in results:
            lines += [f"## {part}", "", f"| side | median, {unit} | quartiles | n |", "|---|---|---|---|"]
            lines += [
                f"| {name} | {row['median']:.0f} | {row['q1']:.0f} to {row['q3']:.0f} | {row['n']} |"
                for name, row in results[part].items()
            ]
            lines += ["", *ratios(part, results[part]), ""]
    if "herd" in results:
        lines += ["## herd", "", *herd_tables(results["herd"])]
    return "\n".join(lines) + "\n"


def ratios(part: str, rows: dict[str, Any]) -> list[str]:
    """Return the ratios that matter, as lines of a list."""
    pairs = {
        "swap": [
            ("llamaherd", "llama-server"),
            ("llamaherd --spare", "llama-server"),
            ("llamaherd --spare, no budget", "llama-server"),
        ],
        "busy": [("llamaherd, two", "llamaherd, one"), ("llamaherd, two", "llama-server, two")],
    }[part]
    return [
        f"* {ours} / {other}: **{rows[ours]['median'] / rows[other]['median']:.2f}**"
        for ours, other in pairs
        if ours in rows and other in rows
    ]


def machine() -> str:
    """Return what the figures were taken on."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores of {model}, Linux {platform.release()}, Python {platform.python_version()}"


def main() -> None:
    """Run the parts that are asked for, print the report and write it."""
    parser = argparse.ArgumentParser(description="Measure the pool.")
    parser.add_argument(
        "--llama-server", default="", help="path of the reference; without it only this project is measured"
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=64, help="tokens per stream in the part 'busy'")
    parser.add_argument("--workers", default="10,100,300", help="sizes of the herd")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--only", default="swap,busy,herd")
    parser.add_argument("--here", action="store_true", help="swap with this environment's own installation")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    parts: dict[str, Callable[[Path], Any]] = {
        "swap": lambda models: measure_swap(models, arguments.llama_server, arguments.rounds, here=arguments.here),
        "busy": lambda models: measure_busy(
            models, arguments.llama_server, arguments.rounds // 2 or 1, arguments.tokens
        ),
        "herd": lambda _: [measure_herd(int(workers), arguments.requests) for workers in arguments.workers.split(",")],
    }
    results: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory() as folder:
        model = find_model("demo").path
        assert model is not None
        for name in NAMES:
            (Path(folder) / f"{name}.gguf").symlink_to(model)
        for part in arguments.only.split(","):
            results[part] = parts[part](Path(folder))
            print(f"{part}: {json.dumps(results[part])}", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "pool.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.out / "pool.md").write_text(report(results))
    print(report(results))


if __name__ == "__main__":
    main()
