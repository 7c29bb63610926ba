"""Measures where models come from: reading a large catalogue, and downloads beside plain huggingface_hub.

    python bench/bench_models.py [--rounds N] [--presets N] [--files N] [--megabytes N] [--only catalogue,download]

Method. The catalogue is a preset file of 2,000 sections with six settings each, and 500 small GGUF files: half in a
models folder, half in a Hugging Face cache of as many repositories; half of the presets name a file, half a
repository. The first round is not counted. Wall time and processor time are of the same runs.

* start: from the start of the process `llamaherd serve` over that catalogue to its line that it listens.
* reload: the unchanged catalogue read anew in a thread and given to an open pool, as `GET /models?reload=1` does.
* stamps: what `--watch` does every two seconds.
* download: one file from a hub on the loopback, which is a process of its own and keeps it in memory, into an empty
  cache. Both sides start a process for it and end with the file in its place: ours a worker of the pool, which checks
  the digest; the other a Python that calls `hf_hub_download`, which checks the length. Rounds are interleaved.
* manager: the processor time of the pool's own process during that download, in percent of one core over its time, and
  for a gigabyte; and how many progress messages came in a second.

Figures are medians with the quartiles beside them.
"""

import argparse
import asyncio
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from bench_pool import machine
from llamaherd.http.presets import PresetOptions
from llamaherd.pool import Catalog, Pool, Sources, fingerprint, gather
from samples import summary

__all__ = ["main", "measure_catalogue", "measure_download", "report"]

_REPO: Final = "bench/model"
_FILE: Final = "model-Q8_0.gguf"
_HUB: Final = """
import os, sys
from stand_in_hub import StandInHub
with StandInHub() as hub:
    hub.add(sys.argv[1], {sys.argv[2]: b"GGUF" + os.urandom(int(sys.argv[3]))})
    print(hub.url, flush=True)
    sys.stdin.read()
"""
_PLAIN: Final = """
import sys
from huggingface_hub import hf_hub_download
print(hf_hub_download(sys.argv[1], sys.argv[2], cache_dir=sys.argv[3]))
"""
_SUPPORT: Final = Path(__file__).parents[1] / "tests" / "support"


# --- the catalogue ----------------------------------------------------------------------------------------------------


def write_catalogue(root: Path, presets: int, files: int) -> Sources:
    """Write a catalogue of that many presets and files."""
    folder, cache, half = root / "models", root / "cache", files // 2
    folder.mkdir(parents=True)
    header = b"GGUF\x03\x00\x00\x00" + bytes(64)
    for number in range(half):
        (folder / f"m{number}.gguf").write_bytes(header)
    for number in range(files - half):
        commit = "a" * 40
        repo = cache / f"models--bench--r{number}"
        for below in ("refs", "blobs", f"snapshots/{commit}"):
            (repo / below).mkdir(parents=True)
        (repo / "refs" / "main").write_text(commit)
        (repo / "blobs" / f"{number:064x}").write_bytes(header)
        (repo / "snapshots" / commit / f"r{number}-Q8_0.gguf").symlink_to(f"../../blobs/{number:064x}")
    lines = ["[*]", "ctx-size = 8192"]
    for number in range(presets):
        there = f"model = {folder}/m{number % half}.gguf"
        where = there if number % 2 else f"hf-repo = bench/r{number % (files - half)}:Q8_0"
        lines += [f"[p{number}]", where, f"ngl = {number % 40}", f"alias = a{number}", "temp = 0.7"]
        lines += [f"stop-timeout = {number % 30 + 1}", "load-on-startup = false"]
    (root / "p.ini").write_text("\n".join(lines))
    return Sources(models_dir=folder, cache=cache, presets=root / "p.ini")


def read(sources: Sources) -> Catalog:
    """Read a catalogue as the server does."""
    return gather(sources, PresetOptions().configure)


def measure_catalogue(presets: int, files: int, rounds: int) -> dict[str, Any]:
    """Return the figures of start, reload and stamps."""
    samples: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        sources = write_catalogue(Path(folder), presets, files)
        for number in range(rounds + 1):
            found = {"start_wall": _start(sources, Path(folder))}
            found |= asyncio.run(_reload(sources))
            wall, cpu = time.perf_counter(), _cpu()
            fingerprint(sources)
            found |= {"stamps_wall": time.perf_counter() - wall, "stamps_cpu": _cpu() - cpu}
            for name, seconds in found.items() if number else ():
                samples.setdefault(name, []).append(seconds)
    figures = {name: summary(values, 1e3) for name, values in samples.items()}
    return {"presets": presets, "files": files, "milliseconds": figures}


def _start(sources: Sources, folder: Path) -> float:
    command = [sys.executable, "-P", "-m", "llamaherd.http", "serve", "--port", "0"]
    command += ["--models-dir", str(sources.models_dir), "--models-preset", str(sources.presets)]
    environment = {**os.environ, "LLAMA_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        seconds = time.perf_counter() - began
        server.terminate()
    if "listening" not in line:
        raise RuntimeError(f"the server did not start: {line!r}")
    return seconds


async def _reload(sources: Sources) -> dict[str, float]:
    async with Pool(read(sources).models) as pool:
        wall, cpu = time.perf_counter(), _cpu()
        catalog = await asyncio.to_thread(read, sources)
        report = pool.reload((*catalog.models, *catalog.broken))
        found = {"reload_wall": time.perf_counter() - wall, "reload_cpu": _cpu() - cpu}
    if report.added or report.changed or report.removed or not report.unchanged:
        raise RuntimeError("an unchanged catalogue has changed")
    return found


# --- downloads --------------------------------------------------------------------------------------------------------


@contextmanager
def hub(size: int) -> Generator[str]:
    """Run a hub with one file of that many bytes, and give its address."""
    command = [sys.executable, "-c", _HUB, _REPO, _FILE, str(size)]
    environment = {**os.environ, "PYTHONPATH": str(_SUPPORT)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()


def measure_download(megabytes: int, rounds: int) -> dict[str, Any]:
    """Return the figures of both sides, and of the manager."""
    samples: dict[str, list[float]] = {}
    with hub(megabytes * 1_000_000) as url, tempfile.TemporaryDirectory() as folder:
        for number in range(rounds + 1):
            found = asyncio.run(_ours(url, Path(folder) / "ours"))
            found["plain_seconds"] = _plain(url, Path(folder) / "plain")
            for name, value in found.items() if number else ():
                samples.setdefault(name, []).append(value)
    figures = {name: summary(values, 1.0) for name, values in samples.items()}
    speed = figures["plain_seconds"]["median"] / figures["seconds"]["median"]
    for name in ("seconds", "plain_seconds"):
        rate = name.replace("seconds", "megabytes_per_second")
        figures[rate] = summary([megabytes / value for value in samples[name]], 1.0)
    return {"megabytes": megabytes, "speed_over_plain": round(speed, 3), "figures": figures}


async def _ours(url: str, cache: Path) -> dict[str, float]:
    told = 0

    async def follow(pool: Pool) -> None:
        nonlocal told
        async for event in pool.events():
            told += event.event == "download_progress"

    async with Pool() as pool:
        following = asyncio.create_task(follow(pool))
        wall, cpu = time.perf_counter(), _cpu()
        await pool.download(_REPO, cache=cache, endpoint=url)
        seconds, spent = time.perf_counter() - wall, _cpu() - cpu
        following.cancel()
        await asyncio.wait([following])
    size = next(cache.rglob(_FILE)).stat().st_size
    shutil.rmtree(cache)
    return {
        "seconds": seconds,
        "manager_percent_of_a_core": 100 * spent / seconds,
        "manager_ms_per_gigabyte": spent * 1e3 / (size / 1e9),
        "progress_messages_per_second": told / seconds,
    }


def _plain(url: str, cache: Path) -> float:
    environment = {**os.environ, "HF_ENDPOINT": url, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-P", "-c", _PLAIN, _REPO, _FILE, str(cache)]
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    seconds = time.perf_counter() - began
    shutil.rmtree(cache)
    return seconds


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


# --- report -----------------------------------------------------------------------------------------------------------


def report(results: dict[str, Any]) -> str:
    """Return the results as Markdown, method first."""
    lines = ["# Where models come from", "", (__doc__ or "").split("Method. ")[1].strip(), ""]
    lines += [f"Machine: {results['machine']}", ""]
    if "catalogue" in results:
        part = results["catalogue"]
        lines += [f"## Catalogue: {part['presets']} presets, {part['files']} files", ""]
        lines += _table("milliseconds", part["milliseconds"])
    if "download" in results:
        part = results["download"]
        lines += [
            f"## Download: {part['megabytes']} MB",
            "",
            f"Speed over plain huggingface_hub: **{part['speed_over_plain']:.2f}**",
        ]
        lines += ["", *_table("figure", part["figures"])]
    return "\n".join(lines) + "\n"


def _table(unit: str, rows: dict[str, dict[str, float]]) -> list[str]:
    head = [f"| {unit} | median | quartiles | n |", "|---|--:|---|--:|"]
    body = [
        f"| {name.replace('_', ' ')} | {row['median']:.1f} | {row['q1']:.1f} to {row['q3']:.1f} | {row['n']:.0f} |"
        for name, row in rows.items()
    ]
    return [*head, *body, ""]


def main() -> None:
    """Run the parts that are asked for, print the report and write it."""
    parser = argparse.ArgumentParser(description="Measure where models come from.")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--presets", type=int, default=2000)
    parser.add_argument("--files", type=int, default=500)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--only", default="catalogue,download")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "catalogue": lambda: measure_catalogue(arguments.presets, arguments.files, arguments.rounds),
        "download": lambda: measure_download(arguments.megabytes, arguments.rounds // 2 or 1),
    }
    results: dict[str, Any] = {"machine": machine()}
    for part in arguments.only.split(","):
        results[part] = parts[part]()
        print(f"{part}: {json.dumps(results[part])}", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "models.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.out / "models.md").write_text(report(results))
    print(report(results))


if __name__ == "__main__":
    main()
