"""Measures the engine beside llama-server: batching, shared prefixes, long prompts, constraints, and what Python costs.

    python bench/bench_engine.py [--llama-server PATH] [--rounds N] [--only PARTS]
        [--quantisation Q4_0|Q4_1] [--out bench/results]

Method. Both servers run as separate processes on the same model file with the same flags and as many threads as there
are cores, and are driven over HTTP by this process, so our side pays for its front end, its pool and its transport.
Prompts are random token ids, new ones for every request; greedy, without end-of-text, so that every request generates
the same number of tokens on both sides. All sides take turns at each thing that is measured, and at being the first;
the first round warms up and is not counted. Figures are medians with the quartiles beside them, ratios are ratios of
medians.

* streams: generated tokens per second of wall time, 64-token prompts included, that many requests at once, 96 tokens
  each; the demo model as shipped (Q4_1), and quantised anew to Q4_0, whose kernels gain more from batches. Either side
  can lay out its cache in two ways: one for all, of which each request may use all (our default; `-kvu`), or divided, a
  sixteenth for each slot (llama-server's default with an explicit `-np`; `-no-kvu`). Compared like with like, and the
  defaults with each other.
* prefix: 8 requests at once that share 1,000 tokens and have 24 of their own, 16 tokens each; the wall time when nobody
  has seen the prefix, and again with other endings when it is resident. `cache_prompt` is on, as by default.
* arrival: four streams run, and a prompt of 1,000 tokens arrives: the longest wait of a running stream for a token, and
  the prompt's speed against the same prompt alone; in both quantisations.
* constraints (ours): the time between two tokens with a JSON schema, and with `top_p` but no `top_k`, against none.
* inside (ours): the engine without a pool; microseconds of a step of 8 sequences with the default samplers, and what of
  it is neither `llama_decode` nor a C sampler, and the same where nothing is decoded between two steps, so that all
  lies in the caches; growth over loads of, and requests to, a tiny model.

llama-server is built from the llama-cpp-python source package, so that both sides run the same ggml; see
bench/README.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from typing import Any, Final, TypeVar

from bench_pool import machine, tables
from engine_load import arrival, at_once, completion, prompt, seconds_per_token, tokens_per_second
from llamaherd.pool import find_model
from samples import summary
from servers import Server, our_command, running

__all__ = ["main"]

T = TypeVar("T")

WIDTHS: Final = (1, 4, 8, 16)
#: llama.cpp's number of the quantisation Q4_0.
_Q4_0: Final = 2
_SCHEMA: Final = {
    "type": "object",
    "properties": {"items": {"type": "array", "minItems": 40, "items": {"type": "string", "minLength": 8}}},
    "required": ["items"],
}


class Bench:
    """Where the servers are and how often to measure."""

    def __init__(self, llama_server: str, rounds: int, folder: Path, quantisation: str = "") -> None:
        self._llama_server = llama_server
        self._quantisation = quantisation
        self.rounds = rounds
        self.folder = folder
        path = find_model("demo").path
        assert path is not None
        self.model = path

    def sides(
        self,
        stack: ExitStack,
        model: Path,
        slots: int,
        cells: int,
        *,
        ours_only: bool = False,
        layouts: bool = False,
    ) -> list[Server]:
        """Start the sides to compare, in both layouts of the cache if asked; the stack stops them."""
        threads = str(len(os.sched_getaffinity(0)))
        flags = ["-m", str(model), "-np", str(slots), "-c", str(cells), "-t", threads]
        commands = {"llamaherd": our_command(*flags)}
        if layouts:
            commands["llamaherd -no-kvu"] = our_command(*flags, "--no-kv-unified")
        if self._llama_server and not ours_only:
            commands["llama-server"] = [self._llama_server, *flags]
            if layouts:
                commands["llama-server -kvu"] = [self._llama_server, *flags, "--kv-unified"]
        servers = [stack.enter_context(running(command, name)) for name, command in commands.items()]
        for server in servers:
            at_once(server, [completion(prompt(16), 2) for _ in range(slots)])
        return servers

    def rounds_of(self, sides: list[Server], each: Sequence[T]) -> Iterator[tuple[T, Server, bool]]:
        """Yield each thing to measure with each side in each round, and whether the round counts. The sides take turns
        at every thing, and at being the first.
        """
        for number in range(self.rounds + 1):
            first = number % len(sides)
            for one in each:
                for server in (*sides[first:], *sides[:first]):
                    yield one, server, number > 0

    def models(self) -> list[tuple[str, Path]]:
        """Return the demo model in both quantisations, or in the one that is asked for."""
        both = [("Q4_0", self.quantised()), ("Q4_1", self.model)]
        return [one for one in both if self._quantisation in ("", one[0])]

    def quantised(self) -> Path:
        """Return the demo model in Q4_0."""
        target = self.folder / "SmolLM2-135M-Instruct.Q4_0.gguf"
        if not target.exists():
            code = (
                "import sys; from llamaherd.pool.child import llama_backend, llama_model; "
                "llama_backend.init_backend(); "
                f"sys.exit(not llama_model.quantize(sys.argv[1].encode(), sys.argv[2].encode(), {_Q4_0}))"
            )
            subprocess.run([sys.executable, "-P", "-c", code, str(self.model), str(target)], check=True)
        return target


Samples = dict[str, list[float]]


def measure_streams(bench: Bench) -> Samples:
    """Tokens per second at every width."""
    samples: Samples = {}
    for label, model in bench.models():
        with ExitStack() as stack:
            sides = bench.sides(stack, model, max(WIDTHS), 4096, layouts=True)
            for width, server, counts in bench.rounds_of(sides, WIDTHS):
                rate = tokens_per_second(server, width, 64, 96)
                if counts:
                    samples.setdefault(f"{label}, {width} streams, {server.name}", []).append(rate)
    return samples


def measure_prefix(bench: Bench) -> Samples:
    """Milliseconds for 8 requests that share a prefix."""
    samples: Samples = {}
    with ExitStack() as stack:
        for _, server, counts in bench.rounds_of(bench.sides(stack, bench.model, 8, 16384), [""]):
            shared = prompt(1_000)
            for state in ("new", "resident"):
                bodies = [completion([*shared, *prompt(24)], 16, cache_prompt=True) for _ in range(8)]
                seconds = at_once(server, bodies)
                if counts:
                    samples.setdefault(f"prefix {state}, {server.name}", []).append(seconds * 1e3)
    return samples


def measure_arrival(bench: Bench) -> Samples:
    """The longest wait in milliseconds, and the prompt's speed against undisturbed."""
    samples: Samples = {}
    for label, model in bench.models():
        with ExitStack() as stack:
            for _, server, counts in bench.rounds_of(bench.sides(stack, model, 8, 16384), [""]):
                seen = arrival(server, 4, 1_000)
                if counts:
                    samples.setdefault(f"{label}, longest wait, ms, {server.name}", []).append(seen.worst * 1e3)
                    share = seen.alone / seen.beside
                    samples.setdefault(f"{label}, prompt speed, share, {server.name}", []).append(share)
    return samples


def measure_constraints(bench: Bench) -> Samples:
    """Milliseconds between two tokens of one stream."""
    samples: Samples = {}
    sampled = {"temperature": 0.8, "cache_prompt": True}
    with ExitStack() as stack:
        for _, server, counts in bench.rounds_of(bench.sides(stack, bench.model, 4, 4096, ours_only=True), [""]):
            for number in range(4):
                kinds: dict[str, dict[str, Any]] = {
                    "free": {},
                    "json_schema": {"json_schema": _SCHEMA},
                    "top_p, top_k": {"top_p": 0.9, "min_p": 0},
                    "top_p, no top_k": {"top_p": 0.9, "min_p": 0, "top_k": 0},
                }
                for kind, fields in kinds.items():
                    body = completion(prompt(32), 128, **sampled, seed=number, **fields)
                    each = seconds_per_token(server, body)
                    if counts:
                        samples.setdefault(kind, []).append(each * 1e3)
    return samples


def measure_inside(bench: Bench) -> Samples:
    """What one process that holds only the engine tells of itself."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
    from tiny_gguf import tiny_model

    tiny = str(tiny_model("random"))
    samples: Samples = {}
    for _ in range(max(1, bench.rounds // 2)):
        for kind, model in (("SmolLM2", str(bench.model)), ("tiny model", tiny)):
            for name, value in _inside("overhead", model, "8", "100").items():
                samples.setdefault(f"{kind}, {name}", []).append(value)
    for name, value in _inside("leaks", tiny, "500", "100000").items():
        samples[f"growth, {name}"] = [value]
    return samples


def _inside(*arguments: str) -> dict[str, float]:
    program = Path(__file__).with_name("engine_inside.py")
    done = subprocess.run([sys.executable, str(program), *arguments], capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


PARTS: Final[dict[str, Callable[[Bench], Samples]]] = {
    "streams": measure_streams,
    "prefix": measure_prefix,
    "arrival": measure_arrival,
    "constraints": measure_constraints,
    "inside": measure_inside,
}

#: Those that measure both quantisations.
BY_QUANTISATION: Final = ("streams", "arrival")


def ratios(results: dict[str, dict[str, Any]]) -> list[tuple[str, float, str]]:
    """Return ``(what, ratio or figure, what is wanted)`` for each target."""
    found: list[tuple[str, float, str]] = []

    def median(part: str, name: str) -> float | None:
        row = results.get(part, {}).get(name)
        return None if row is None else row["median"]

    def compare(part: str, ours: str, other: str, wanted: str, text: str = "") -> None:
        above, below = median(part, ours), median(part, other)
        if above is not None and below:
            found.append((text or f"{ours} / {other}", above / below, wanted))

    for label in ("Q4_0", "Q4_1"):
        for width in WIDTHS:
            name = f"{label}, {width} streams"
            for what, ours, other in (
                ("divided", "llamaherd -no-kvu", "llama-server"),
                ("unified", "llamaherd", "llama-server -kvu"),
                ("defaults", "llamaherd", "llama-server"),
            ):
                text = f"tokens per second, {name}, {what}"
                compare("streams", f"{name}, {ours}", f"{name}, {other}", ">= 1.0", text)
    compare("prefix", "prefix new, llamaherd", "prefix new, llama-server", "<= 0.2")
    compare("prefix", "prefix resident, llamaherd", "prefix new, llama-server", "<= 0.08")
    compare("prefix", "prefix resident, llamaherd", "prefix resident, llama-server", "")
    compare("constraints", "json_schema", "free", "<= 1.10")
    compare("constraints", "top_p, no top_k", "top_p, top_k", "<= 1.05")
    for part, name, wanted in (
        *(("arrival", f"{label}, longest wait, ms, llamaherd", "<= 400") for label in ("Q4_0", "Q4_1")),
        *(("arrival", f"{label}, prompt speed, share, llamaherd", ">= 0.93") for label in ("Q4_0", "Q4_1")),
        ("inside", "SmolLM2, python_us", "<= 100"),
        ("inside", "SmolLM2, python_warm_us", ""),
        ("inside", "growth, loads_bytes", "< 2 MB"),
        ("inside", "growth, requests_bytes", "< 2 MB"),
    ):
        value = median(part, name)
        if value is not None:
            found.append((name, value, wanted))
    return found


def report(results: dict[str, Any]) -> str:
    """Return the results as Markdown, method first."""
    lines = ["# The engine", "", (__doc__ or "").split("Method. ")[1].strip(), "", f"Machine: {results['machine']}", ""]
    sittings: dict[str, str] = results.get("sittings", {})
    lines += [f"* {part}: {when}" for part, when in sorted(sittings.items())]
    lines += ["", "## Targets", "", "| what | measured | wanted |", "|---|--:|--:|"]
    lines += [f"| {what} | {value:,.2f} | {wanted} |" for what, value, wanted in ratios(results)]
    lines += tables(results, PARTS)
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the parts that are asked for, print the report and write it."""
    parser = argparse.ArgumentParser(description="Measure the engine.")
    parser.add_argument(
        "--llama-server", default="", help="path of the reference; without it only this project is measured"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, by commas; what the others gave before stays")
    parser.add_argument("--quantisation", default="", choices=["", "Q4_0", "Q4_1"], help="measure only this one")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    target = arguments.out / "engine.json"
    results: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {}
    results["machine"] = machine()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments.llama_server, arguments.rounds, Path(folder), arguments.quantisation)
        for part in arguments.only.split(","):
            samples = PARTS[part](bench)
            measured = {name: summary(values, 1.0) for name, values in samples.items()}
            one = arguments.quantisation and part in BY_QUANTISATION
            name = f"{part} {arguments.quantisation}" if one else part
            results.setdefault("sittings", {})[name] = f"{date.today()}, {arguments.rounds} rounds"
            results[part] = {**results.get(part, {}), **measured} if one else measured
            print(f"{part}: {json.dumps(measured)}", flush=True)
    target.write_text(json.dumps(results, indent=1) + "\n")
    (arguments.out / "engine.md").write_text(report(results))
    print(report(results))


if __name__ == "__main__":
    main()
