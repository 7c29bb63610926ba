"""The engine by itself, in this process: what Python costs per step, and whether anything leaks.

    python bench/engine_inside.py overhead MODEL STREAMS STEPS
    python bench/engine_inside.py leaks MODEL CYCLES REQUESTS

Prints one line of JSON. A process of its own for each measurement, so that none sees what another left behind.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from llamaherd.pool.child import llama_context, llama_sampler
from llamaherd.pool.child.huge_pages import HugePages
from llamaherd.pool.child.llama_engine import LlamaEngine
from llamaherd.pool.machine import resident_bytes
from llamaherd.transport.messages import EngineOptions, Generate, Load, Sampling

__all__ = ["leaks", "overhead"]

Result = TypeVar("Result")

#: How long no thread ends once all that were told to have.
_SETTLED_SECONDS = 0.2
#: What threads that were told to end may take for that.
_END_SECONDS = 5.0


class _Clock:
    """Adds up the thread's processor time in functions that it wraps: waiting for a core is nobody's cost."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, function: Callable[..., Result]) -> Callable[..., Result]:
        def timed(*arguments: Any) -> Result:
            began = time.thread_time()
            result = function(*arguments)
            self.seconds += time.thread_time() - began
            return result

        return timed


def overhead(model: str, streams: int, steps: int) -> dict[str, float]:
    """Return the processor time of the engine's thread per step, in microseconds: in all, and by parts; and the time
    by the wall. Waiting for a GPU is part of decoding, and ``pages`` is memory that moves into huge pages, which ends
    some time after the load. ``python_warm`` is what Python takes where nothing is decoded
    between two steps: the difference is what it waits for memory, as decoding leaves nothing of it in the caches.
    """
    decode, sampler, pages = _Clock(), _Clock(), _Clock()
    llama_context.decode = decode.wrap(llama_context.decode)
    llama_context.synchronize = decode.wrap(llama_context.synchronize)
    llama_sampler.sample = sampler.wrap(llama_sampler.sample)
    llama_sampler.apply = sampler.wrap(llama_sampler.apply)
    HugePages.tend = pages.wrap(HugePages.tend)  # type: ignore[method-assign]
    engine = _loaded(model, streams, 16384)
    for number in range(streams):
        engine.submit(_request(number, f"Story number {number}:", steps * 2 + 100))
    for _ in range(20):
        engine.step()

    def measured() -> dict[str, float]:
        decode.seconds = sampler.seconds = pages.seconds = 0.0
        began, wall = time.thread_time(), time.perf_counter()
        for _ in range(steps):
            engine.step()
        whole, wall = time.thread_time() - began, time.perf_counter() - wall
        known = {"decode": decode.seconds, "sampler": sampler.seconds, "pages": pages.seconds}
        return {"wall": wall, "step": whole, **known, "python": whole - sum(known.values())}

    parts = measured()
    llama_context.decode = _decode_nothing
    parts["python_warm"] = measured()["python"]
    return {f"{name}_us": round(seconds / steps * 1e6, 1) for name, seconds in parts.items()}


def _decode_nothing(context: int, batch: Any, n_tokens: int) -> int:
    """Leave the last logits as they are."""
    del context, batch, n_tokens
    return 0


def leaks(model: str, cycles: int, requests: int) -> dict[str, int]:
    """Return what grew over many loads and then over many requests: resident bytes, threads, descriptors."""
    for number in range(20):
        _cycle(model, number)
    before = _settled()
    for number in range(cycles):
        _cycle(model, number)
    loads = _growth(before)
    engine = _loaded(model, 8, 2048)
    _serve(engine, 2_000)
    before = _settled()
    _serve(engine, requests)
    return {f"loads_{name}": value for name, value in loads.items()} | {
        f"requests_{name}": value for name, value in _growth(before).items()
    }


def _loaded(model: str, slots: int, n_ctx: int) -> LlamaEngine:
    engine = LlamaEngine()
    options = EngineOptions(n_ctx=n_ctx, n_parallel=slots)
    engine.load(Load(model="bench", path=model, options=options), lambda _fraction: True)
    return engine


def _request(number: int, prompt: str, max_tokens: int) -> Generate:
    sampling = Sampling(seed=number + 1)
    return Generate(request=number, prompt=prompt, max_tokens=max_tokens, ignore_eos=True, sampling=sampling)


def _cycle(model: str, number: int) -> None:
    engine = _loaded(model, 2, 512)
    engine.submit(_request(number, "hello", 4))
    _drain(engine)
    engine.unload()


def _serve(engine: LlamaEngine, requests: int) -> None:
    for start in range(0, requests, 64):
        for number in range(start, min(start + 64, requests)):
            engine.submit(_request(number, f"hello {number % 7} and {number % 11}", 4))
        _drain(engine)


def _drain(engine: LlamaEngine) -> None:
    while engine.busy:
        engine.step()


def _held() -> dict[str, int]:
    return {
        "bytes": resident_bytes(),
        "threads": len(os.listdir("/proc/self/task")) if Path("/proc/self/task").exists() else threading.active_count(),
        "descriptors": len(os.listdir("/dev/fd")),
    }


def _settled() -> dict[str, int]:
    """Return what is held once the threads that are ending have ended: none has for a while."""
    held, until = _held(), time.monotonic() + _SETTLED_SECONDS
    while time.monotonic() < until:
        os.sched_yield()
        now = _held()
        if now["threads"] < held["threads"]:
            until = time.monotonic() + _SETTLED_SECONDS
        held = now
    return held


def _growth(before: dict[str, int]) -> dict[str, int]:
    until = time.monotonic() + _END_SECONDS
    while _held()["threads"] > before["threads"] and time.monotonic() < until:
        os.sched_yield()
    return {name: value - before[name] for name, value in _held().items()}


if __name__ == "__main__":
    which, path, *numbers = sys.argv[1:]
    print(json.dumps({"overhead": overhead, "leaks": leaks}[which](path, *map(int, numbers))))
