"""Measures the server beside llama-server on an NVIDIA GPU, and what Python costs where a step takes milliseconds.

    python bench/bench_gpu.py --llama-server PATH [--rounds N] [--out bench/results]

Method. Both servers run as separate processes on one GPU at the same time, one of them idle, with the same model file
and flags: all layers on the GPU, 32 slots, 1,024 cells each (llama-server also with `-kvu`, one cache for all, as it is
with us), and `--cache-ram 0`: no prompt comes twice, and llama-server would copy each slot's state to RAM first. The
model has the shape of Llama 3 8B in Q8_0 with random weights and a vocabulary of 128,256. Prompts are random token ids,
new ones for every request; greedy, without end-of-text, so that every request generates the same number of tokens on
both sides. Rounds of all sides are interleaved; the first round warms up and is not counted. Figures are medians with
the quartiles beside them, ratios are ratios of medians.

* streams: generated tokens per second of wall time, 64-token prompts included, that many requests at once, 128 tokens
  each.
* token: milliseconds between two tokens of one stream, as a client sees them.
* prompt: tokens per second of one prompt of 4,000 tokens, alone.
* inside (ours): the engine without a pool, milliseconds of a step that a sequence each takes part in; of the engine's
  thread, microseconds of processor time that are neither llama.cpp's decoding (waiting for the GPU included) nor its
  samplers. Default samplers.
* memory (ours): MiB of the GPU and of the machine that the worker takes, and what was expected of it.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import psutil

from bench_pool import machine, tables
from engine_load import at_once, completion, prompt, seconds_per_token, tokens_per_second
from llamaherd.pool import EngineOptions, ModelSpec, Pool
from llamaherd.pool.gpus import find_gpus
from llamaherd.pool.memory import expected_shares
from samples import summary
from servers import Server, our_command, running

__all__ = ["main"]

WIDTHS: Final = (1, 8, 32)
CELLS: Final = 1024
PROMPT: Final = 4000
_MIB: Final = 1024 * 1024

Samples = dict[str, list[float]]


class Bench:
    """The model, the servers that are compared, and how often to measure."""

    def __init__(self, model: Path, llama_server: str, rounds: int) -> None:
        self.model = model
        self.rounds = rounds
        self._llama_server = llama_server

    def sides(self, stack: ExitStack, slots: int, cells: int) -> list[Server]:
        """Start the servers; the stack stops them."""
        flags = ["-m", str(self.model), "-ngl", "99", "-np", str(slots), "-c", str(cells), "--cache-ram", "0"]
        commands = {"llamaherd": our_command(*flags, "--memory-budget", "0")}
        if self._llama_server:
            commands["llama-server"] = [self._llama_server, *flags]
            if slots > 1:
                commands["llama-server -kvu"] = [self._llama_server, *flags, "--kv-unified"]
        servers = [stack.enter_context(running(command, name)) for name, command in commands.items()]
        for server in servers:
            at_once(server, [completion(prompt(16), 2) for _ in range(slots)])
        return servers

    def rounds_of(self, sides: Sequence[Server]) -> Iterator[tuple[Server, bool]]:
        """Yield each side in each round, and whether the round counts."""
        for number in range(self.rounds + 1):
            for server in sides:
                yield server, number > 0


def measure_streams(bench: Bench) -> Samples:
    """Tokens per second at every width, and milliseconds between two tokens."""
    samples: Samples = {}
    with ExitStack() as stack:
        for server, counts in bench.rounds_of(bench.sides(stack, max(WIDTHS), max(WIDTHS) * CELLS)):
            for width in WIDTHS:
                rate = tokens_per_second(server, width, 64, 128)
                if counts:
                    samples.setdefault(f"{width} streams, {server.name}", []).append(rate)
            each = seconds_per_token(server, completion(prompt(64), 128))
            if counts:
                samples.setdefault(f"ms per token, {server.name}", []).append(each * 1e3)
    return samples


def measure_prompt(bench: Bench) -> Samples:
    """Prompt tokens per second."""
    samples: Samples = {}
    with ExitStack() as stack:
        for server, counts in bench.rounds_of(bench.sides(stack, 1, 8192)):
            seconds = at_once(server, [completion(prompt(PROMPT), 1)])
            if counts:
                samples.setdefault(f"prompt, {server.name}", []).append(PROMPT / seconds)
    return samples


def measure_inside(bench: Bench) -> Samples:
    """What a process that holds only the engine tells of its steps."""
    program = Path(__file__).with_name("engine_inside.py")
    samples: Samples = {}
    for _ in range(max(1, bench.rounds // 2)):
        for width in WIDTHS:
            command = [sys.executable, str(program), "overhead", str(bench.model), str(width), "200"]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
            figures: dict[str, float] = json.loads(done.stdout)
            samples.setdefault(f"{width} sequences, ms of a step", []).append(figures["wall_us"] / 1e3)
            samples.setdefault(f"{width} sequences, us of Python in it", []).append(figures["python_us"])
    return samples


def measure_memory(bench: Bench) -> Samples:
    """What a worker takes, by NVML and by the kernel."""
    gpus = find_gpus()
    spec = ModelSpec(name="m", path=bench.model, options=EngineOptions(n_ctx=8192))
    host, ((on_gpu, *_), *_) = expected_shares(spec, gpus.devices())

    async def scene() -> tuple[int, int]:
        before = gpus.devices()[0].free
        async with Pool([spec], memory_budget="auto", gpus=gpus) as pool:
            pid = (await pool.load("m")).pid
            await pool.complete("m", prompt(2000), max_tokens=16, ignore_eos=True).collect()
            return before - gpus.devices()[0].free, psutil.Process(pid).memory_info().rss

    taken, resident = asyncio.run(scene())
    figures = {"GPU, expected": on_gpu, "GPU, taken": taken, "machine, expected": host, "machine, resident": resident}
    return {f"MiB of the {name}": [float(value // _MIB)] for name, value in figures.items()}


PARTS: Final[dict[str, Callable[[Bench], Samples]]] = {
    "streams": measure_streams,
    "prompt": measure_prompt,
    "inside": measure_inside,
    "memory": measure_memory,
}


def ratios(results: dict[str, dict[str, Any]]) -> list[tuple[str, float]]:
    """Return what our medians are in parts of the reference's."""
    found: list[tuple[str, float]] = []
    for part in ("streams", "prompt"):
        rows = results.get(part, {})
        for name, row in rows.items():
            what, _, side = name.rpartition(", ")
            ours = rows.get(f"{what}, llamaherd")
            if side != "llamaherd" and ours is not None:
                found.append((f"{what}, against {side}", ours["median"] / row["median"]))
    return found


def report(results: dict[str, Any]) -> str:
    """Return the results as Markdown, method first."""
    lines = ["# On a GPU", "", (__doc__ or "").split("Method. ")[1].strip(), ""]
    lines += [f"GPU: {results['gpu']}", "", f"Machine: {results['machine']}", ""]
    lines += ["## Ratios", "", "| llamaherd | ratio |", "|---|--:|"]
    lines += [f"| {what} | {value:,.2f} |" for what, value in ratios(results)]
    lines += tables(results, PARTS)
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the parts that are asked for, print the report and write it."""
    parser = argparse.ArgumentParser(description="Measure the server on a GPU.")
    parser.add_argument("--llama-server", default="", help="path of the reference, built for the GPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--model", type=Path, help="a model file; by default one is written")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    results: dict[str, Any] = {
        "gpu": ", ".join(f"{gpu.name}, {gpu.total // _MIB} MiB" for gpu in find_gpus().devices()) or "none",
        "machine": machine(),
    }
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments.model or _written(Path(folder)), arguments.llama_server, arguments.rounds)
        for part in arguments.only.split(","):
            results[part] = {name: summary(values, 1.0) for name, values in PARTS[part](bench).items()}
            print(f"{part}: {json.dumps(results[part])}", flush=True)
            arguments.out.mkdir(parents=True, exist_ok=True)
            (arguments.out / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
            (arguments.out / "gpu.md").write_text(report(results))
    print(report(results))


def _written(folder: Path) -> Path:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
    from large_gguf import LARGE, write_large_llama

    path = folder / "large.gguf"
    write_large_llama(path, LARGE)
    return path


if __name__ == "__main__":
    main()
