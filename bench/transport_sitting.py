"""One sitting: all quiet measurements of one transport on one loop, in a process of its own.

``python transport_sitting.py TASK...``, where each TASK is the JSON of a :class:`Task`; prints the samples as JSON.
"""

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from typing import Final

import msgspec

from llamaherd.transport import ChannelError, ChannelFull
from llamaherd.transport.messages import ChildMessage, Result, Threads, Tokens
from pinning import pin
from samples import Sample, tails
from transport_peer import STATE_SIZE
from transport_world import Peer, World, open_world, run
from workload import SEQUENCES, command, stamp_of

__all__ = ["Task", "sizes_label"]

_TURN: Final = 64  # messages that one turn of the loop sends in the batched measurement


class Task(msgspec.Struct, frozen=True):
    """What to measure.

    Attributes:
        trips: Round trips for each of ``trip_sizes`` (bytes of body), after a tenth as many for warm-up.
        rates: Decode steps a second, each for ``pace_seconds``.
        flows: (bytes of body, messages) for each size of the throughput measurement.
        spawns: Peers started one after another for the start-up cost.
    """

    transport: str
    loop: str
    trips: int
    trip_sizes: tuple[int, ...]
    rates: tuple[int, ...]
    pace_seconds: float
    flows: tuple[tuple[int, int], ...]
    spawns: int


def sizes_label(size: int) -> str:
    """Return a size in bytes for people: ``64 B``, ``1 KiB``, ``1 MiB``."""
    if size and size % 2**20 == 0:
        return f"{size // 2**20} MiB"
    return f"{size // 1024} KiB" if size and size % 1024 == 0 else f"{size} B"


async def round_trips(peer: Peer, size: int, count: int) -> dict[str, float]:
    ping = command(size)
    warm_up = count // 10 + 1
    await peer.begin("echo", size=size)
    for _ in range(warm_up):
        await peer.channel.send(ping)
        await peer.one()
    durations: list[int] = []
    cpu = peer.cpu_s()
    for _ in range(count):
        before = time.perf_counter_ns()
        await peer.channel.send(ping)
        await peer.one()
        durations.append(time.perf_counter_ns() - before)
    cpu = peer.cpu_s() - cpu
    await peer.channel.send(Threads(n=0))
    report = await peer.report()
    return {
        **tails(durations),
        "pool_cpu_us": cpu / count * 1e6,
        "worker_cpu_us": report["cpu_s"] / (count + warm_up) * 1e6,
    }


class Volley:
    """Round trips without a task: each answer is the next message's cause, as news of a worker is in the pool."""

    def __init__(self, peer: Peer, size: int, trips: int) -> None:
        self._send = peer.channel.send_nowait
        self._ping = command(size)
        self._left = trips
        self._before = 0
        self.durations: list[int] = []
        self.report: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        peer.channel.deliver(self._on_messages, self._on_end)

    def serve(self) -> None:
        self._before = time.perf_counter_ns()
        self._send(self._ping)

    def _on_messages(self, messages: Sequence[ChildMessage]) -> None:
        if self._left:
            self.durations.append(time.perf_counter_ns() - self._before)
            self._left -= 1
            if self._left:
                self._before = time.perf_counter_ns()
                self._send(self._ping)
            else:
                self._send(Threads(n=0))
        elif isinstance(messages[0], Result):
            self.report.set_result(messages[0])

    def _on_end(self, error: ChannelError) -> None:
        if not self.report.done():
            self.report.set_exception(error)


async def delivered_trips(peer: Peer, size: int, count: int) -> dict[str, float]:
    """As :func:`round_trips`, by :meth:`Channel.deliver`."""
    warm_up = count // 10 + 1
    await peer.begin("echo", size=size)
    volley = Volley(peer, size, count + warm_up)
    cpu = peer.cpu_s()
    volley.serve()
    result = await volley.report
    cpu = peer.cpu_s() - cpu
    worker_s: float = json.loads(result.text or "{}")["cpu_s"]
    return {
        **tails(volley.durations[warm_up:]),
        "pool_cpu_us": cpu / (count + warm_up) * 1e6,
        "worker_cpu_us": worker_s / (count + warm_up) * 1e6,
    }


async def one_way(peer: Peer, rate: int, count: int) -> dict[str, float]:
    await peer.begin("pace", rate=rate, count=count)
    delays: list[int] = []
    cpu = peer.cpu_s()
    while len(delays) < count:
        messages = await peer.batch(count - len(delays))
        now = time.monotonic_ns()
        delays += [now - stamp_of(step) for step in messages if isinstance(step, Tokens)]
    cpu = peer.cpu_s() - cpu
    report = await peer.report()
    return {
        **tails(delays),
        "send_us": report["send_us"],
        "achieved_per_s": report["rate"],
        "pool_cpu_us": cpu / count * 1e6,
        "worker_cpu_us": report["cpu_s"] / count * 1e6,
    }


def _flow(elapsed: float, count: int, size: int, pool_s: float, worker_s: float) -> dict[str, float]:
    return {
        "messages_per_s": count / elapsed,
        "MB_per_s": count * size / elapsed / 1e6,
        "pool_cpu_us": pool_s / count * 1e6,
        "worker_cpu_us": worker_s / count * 1e6,
    }


async def upward(peer: Peer, size: int, count: int) -> dict[str, float]:
    """Worker to pool, one blocking send per message; size 0 stands for decode steps."""
    cpu, before = peer.cpu_s(), time.perf_counter()
    await peer.begin("pour", size=size, count=count)
    left = count
    while left:
        left -= len(await peer.batch(left))
    elapsed, cpu = time.perf_counter() - before, peer.cpu_s() - cpu
    report = await peer.report()
    return _flow(elapsed, count, size, cpu, report["cpu_s"])


async def downward(peer: Peer, size: int, count: int, turn: int) -> dict[str, float]:
    """Pool to worker, ``turn`` sends in each turn of the loop; ends when the worker says that it has read all."""
    message = command(size)
    cpu, before = peer.cpu_s(), time.perf_counter()
    await peer.begin("drain", count=count)
    for sent in range(count):
        try:
            peer.channel.send_nowait(message)
        except ChannelFull:
            await peer.channel.send(message)
        if sent % turn == turn - 1:
            await asyncio.sleep(0)
    report = await peer.report()
    elapsed, cpu = time.perf_counter() - before, peer.cpu_s() - cpu
    return _flow(elapsed, count, size, cpu, report["cpu_s"])


async def start_ups(world: World, task: Task) -> list[Sample]:
    samples: list[Sample] = []
    for _ in range(task.spawns):
        peer = await world.start()
        values = {
            "first_message_ms": peer.started_ms,
            "channel_us": peer.created_us,
            "connect_us": peer.hello["connect_us"],
        }
        samples.append(Sample("start_up", task.transport, task.loop, "one worker", values))
        await peer.stop()
    return samples


async def sit(task: Task) -> list[Sample]:
    """Measure everything that the task asks for."""
    samples: list[Sample] = []

    def add(measure: str, variant: str, values: dict[str, float]) -> None:
        samples.append(Sample(measure, task.transport, task.loop, variant, values))

    async with open_world(task.transport) as world:
        samples += await start_ups(world, task)
        labels = {size: "state, 50 B" if size == STATE_SIZE else sizes_label(size) for size in task.trip_sizes}
        for size, label in labels.items():
            peer = await world.start()
            add("round_trip", label, await delivered_trips(peer, size, task.trips))
            await peer.stop()
        peer = await world.start()
        for size, label in labels.items():
            add("round_trip", f"{label}, awaited", await round_trips(peer, size, task.trips))
        for rate in task.rates:
            await one_way(peer, rate, max(5, rate // 20))  # warm-up
            add("one_way", f"{rate}/s", await one_way(peer, rate, max(10, round(rate * task.pace_seconds))))
        for size, count in task.flows:
            await upward(peer, size, count // 10 + 1)
            add("throughput", f"{sizes_label(size)} up", await upward(peer, size, count))
        size, count = task.flows[0]
        for variant, turn in (
            (f"{sizes_label(size)} down, batched", _TURN),
            (f"{sizes_label(size)} down, unbatched", 1),
        ):
            await downward(peer, size, count // 10 + 1, turn)
            add("throughput", variant, await downward(peer, size, count, turn))
        await upward(peer, 0, count // 10 + 1)
        steps = await upward(peer, 0, count)
        steps["tokens_per_s"] = steps["messages_per_s"] * SEQUENCES
        del steps["MB_per_s"]
        add("decode_steps", f"{SEQUENCES} sequences", steps)
        await peer.stop()
    return samples


def _main() -> None:
    pin("pool")
    tasks = [msgspec.json.decode(words, type=Task) for words in sys.argv[1:]]
    samples = [sample for task in tasks for sample in run(task.loop, sit(task))]
    sys.stdout.write(msgspec.json.encode(samples).decode())


if __name__ == "__main__":
    _main()
