"""The herd part of ``bench_pool.py``: what many workers cost the one manager. Its method stands there."""

import asyncio
import itertools
import resource
import selectors
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import psutil

from llamaherd.pool import EngineOptions, ModelSpec, Pool, State
from samples import summary

__all__ = ["herd_tables", "measure_herd"]

#: Requests at once, and workers that they go to in turn; None means all.
LOADS: Final[tuple[tuple[int, int | None], ...]] = ((64, None), (10, None), (10, 10))
#: Each load is measured so often, in turn with the others, and the cheapest counts: what others do on the machine only
#: makes it dearer.
ROUNDS: Final = 3
WORDS: Final = "one two three"


class CountingSelector(selectors.DefaultSelector):
    """Counts the turns of its loop, and the descriptors that were ready in them."""

    turns = 0
    ready = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """As the base's."""
        found = super().select(timeout)
        self.turns += 1
        self.ready += len(found)
        return found


def measure_herd(workers: int, requests: int) -> dict[str, Any]:
    """Load so many scripted workers into one manager and put the requests through them, once for each load and round.

    Runs a loop of its own, asyncio's.
    """
    selector = CountingSelector()
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
        return runner.run(_measure(workers, requests, selector))


async def _measure(workers: int, requests: int, selector: CountingSelector) -> dict[str, Any]:
    names = [f"w{number}" for number in range(workers)]
    specs = [
        ModelSpec(name=name, engine="fake", script={"load_steps": 1}, options=EngineOptions(n_parallel=8))
        for name in names
    ]
    me = psutil.Process()
    async with Pool(specs, models_max=0, queue_max=0) as pool:
        before = me.memory_info().rss
        began = time.perf_counter()
        for start in range(0, workers, 20):
            await asyncio.gather(*(pool.load(name) for name in names[start : start + 20]))
        ready = time.perf_counter() - began
        rss = (me.memory_info().rss - before) / workers
        latency = await _state_latency(pool, names)
        cpu, idle_began = sum(_cpu()), time.perf_counter()
        await asyncio.sleep(3)
        idle = (sum(_cpu()) - cpu) / (time.perf_counter() - idle_began)
        loads = await _measure_loads(pool, names, requests, selector)
        assert all(status.state is State.LOADED for status in pool.models())
    return {
        "workers": workers,
        "ready_s": round(ready, 2),
        "rss_per_worker_kB": round(rss / 1000),
        "idle_cpu_percent": round(100 * idle, 2),
        "requests_per_s": max(load["requests_per_s"] for load in loads if load["at_once"] == LOADS[0][0]),
        "state_latency_ms": summary(latency, 1e3),
        "loads": loads,
    }


async def _measure_loads(
    pool: Pool, names: Sequence[str], requests: int, selector: CountingSelector
) -> list[dict[str, Any]]:
    best: dict[tuple[int, int | None], dict[str, Any]] = {}
    for _ in range(ROUNDS):
        for load in LOADS:
            at_once, used = load
            figures = await _measure_load(pool, names[:used], requests, at_once, selector)
            if load not in best or figures["cpu_us"] < best[load]["cpu_us"]:
                best[load] = figures
    return list(best.values())


async def _measure_load(
    pool: Pool, names: Sequence[str], requests: int, at_once: int, selector: CountingSelector
) -> dict[str, Any]:
    """Return what one request costs on the average, so many at once, each to the worker after the last one's."""
    (user, system), began = _cpu(), time.perf_counter()
    turns, ready, received = selector.turns, selector.ready, pool.counts().received
    await _put_through(pool, names, requests, at_once)
    (user_now, system_now), wall = _cpu(), time.perf_counter() - began
    return {
        "at_once": at_once,
        "workers_used": len(names),
        "requests_per_s": round(requests / wall),
        "cpu_us": round((user_now - user + system_now - system) / requests * 1e6, 1),
        "user_us": round((user_now - user) / requests * 1e6, 1),
        "system_us": round((system_now - system) / requests * 1e6, 1),
        "turns": round((selector.turns - turns) / requests, 2),
        "reads": round((selector.ready - ready) / requests, 2),
        "messages": round((pool.counts().received - received) / requests, 2),
    }


def _cpu() -> tuple[float, float]:
    """Return this process's seconds in its own code and in the kernel. Their sum is exact, the parts are sampled."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime, usage.ru_stime


async def _put_through(pool: Pool, names: Sequence[str], requests: int, at_once: int) -> None:
    left = iter(range(requests))
    turn = itertools.cycle(names)

    async def ask() -> None:
        for _ in left:
            answer = await pool.complete(next(turn), WORDS).collect()
            assert answer.text == WORDS

    # As many tasks as requests at once, and not one for each request: thousands that wait would be measured too.
    await asyncio.gather(*(ask() for _ in range(at_once)))


async def _state_latency(pool: Pool, names: Sequence[str]) -> list[float]:
    """Return the seconds from a sleep command to the event that says so, for up to 100 workers."""
    samples: list[float] = []
    for name in names[:100]:
        async with pool.events() as events:
            await anext(events)
            began = time.perf_counter()
            pool.start_sleep(name)
            async for event in events:
                if event.model == name and event.data["status"] == State.SLEEPING:
                    break
            samples.append(time.perf_counter() - began)
        await pool.load(name)
        await pool.complete(name, "wake").collect()
    return samples


def herd_tables(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of two tables: each herd, and each load of each herd."""
    herds = [key for key in rows[0] if key not in ("state_latency_ms", "loads")]
    loads = list(rows[0]["loads"][0])
    lines = [_line([*herds, "state latency p99, ms"]), "|---" + "|--:" * len(herds) + "|"]
    lines += [_line([*(row[key] for key in herds), f"{row['state_latency_ms']['p99']:.2f}"]) for row in rows]
    lines += ["", "Of each load, for one request:", "", _line(["workers", *loads]), "|---" + "|--:" * len(loads) + "|"]
    lines += [_line([row["workers"], *(load[key] for key in loads)]) for row in rows for load in row["loads"]]
    return lines


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
