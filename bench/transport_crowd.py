"""Fan-in: many workers' channels into one pool, and what a channel weighs there.

``python transport_crowd.py TASK...`` prints the samples as JSON. The channels are spread over a few light peer
processes (the same file with ``peer`` as its argument), which send messages that are encoded already, so that the
pool's side is what is measured and 500 channels do not need 500 interpreters.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, cast

import msgspec
import psutil

from llamaherd.transport import CHANNEL_ENV, ChannelError, Endpoint, Stdio, connect
from llamaherd.transport.messages import ChildMessage, encode
from pinning import pin
from samples import Sample
from transport_peer import RawChannel
from transport_world import no_log, open_transport, run
from workload import decode_step

__all__ = ["CrowdTask"]

_PEERS_ENV: Final = "BENCH_CROWD"
_PROCESSES: Final = 4
_FLOOD_SECONDS: Final = 30
_CONNECT_SECONDS: Final = 30


class CrowdTask(msgspec.Struct, frozen=True):
    """What to measure: ``messages`` decode steps in all, from ``workers`` channels."""

    transport: str
    loop: str
    workers: int
    messages: int


class Count:
    """Counts what arrives on all channels."""

    def __init__(self) -> None:
        self._left = 0
        self._reached = asyncio.Event()

    def expect(self, messages: int) -> None:
        self._left += messages
        self._reached.clear()

    async def reached(self, seconds: float) -> None:
        async with asyncio.timeout(seconds):
            await self._reached.wait()

    def take(self, messages: Sequence[ChildMessage]) -> None:
        self._left -= len(messages)
        if self._left == 0:
            self._reached.set()


async def gather(task: CrowdTask) -> list[Sample]:
    """Open the channels, weigh them, and take one flood from all of them at once."""
    transport = open_transport(task.transport)
    await transport.open()
    before = psutil.Process().memory_info().rss
    began = time.perf_counter()
    endpoints = [await transport.endpoint(f"worker#{number}", no_log) for number in range(task.workers)]
    created = time.perf_counter() - began
    count = Count()
    count.expect(task.workers)
    for endpoint in endpoints:
        endpoint.channel.deliver(count.take, no_end)  # as the pool takes messages
    each = max(1, task.messages // task.workers)
    with peers(endpoints, each) as gates:
        try:
            await count.reached(_CONNECT_SECONDS)
            weight = psutil.Process().memory_info().rss - before
            values = await one_flood(count, gates, max(1, each // 10) * task.workers)  # warm-up
            values = await one_flood(count, gates, each * task.workers)
        finally:
            await transport.aclose()
    values["channel_us"] = created / task.workers * 1e6
    values["channel_KiB"] = weight / task.workers / 1024
    return [Sample("fan_in", task.transport, task.loop, f"{task.workers} workers", values)]


async def one_flood(count: Count, gates: list[int], messages: int) -> dict[str, float]:
    count.expect(messages)
    cpu, before = time.process_time(), time.perf_counter()
    for gate in gates:
        os.write(gate, b"o")
    await count.reached(_FLOOD_SECONDS)
    elapsed, cpu = time.perf_counter() - before, time.process_time() - cpu
    return {"messages_per_s": messages / elapsed, "pool_cpu_us": cpu / messages * 1e6}


def no_end(error: ChannelError) -> None:
    """Take the end of a channel; the count tells whether it came too early."""
    del error


@contextmanager
def peers(endpoints: list[Endpoint], each: int) -> Generator[list[int]]:
    """Start the peer processes; yield the gates that let each of them send. On leaving they end."""
    gates: list[int] = []
    running: list[subprocess.Popen[bytes]] = []
    try:
        for part in range(min(_PROCESSES, len(endpoints))):
            their_gate, gate = os.pipe()
            gates.append(gate)
            running.append(_start(endpoints[part::_PROCESSES], each, their_gate))
            os.close(their_gate)
        yield gates
    finally:
        for gate in gates:
            os.close(gate)
        for process in running:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _start(endpoints: list[Endpoint], each: int, gate: int) -> subprocess.Popen[bytes]:
    places = [(endpoint.stdin, endpoint.stdout, endpoint.env[CHANNEL_ENV]) for endpoint in endpoints]
    inherited = {gate}
    for endpoint in endpoints:
        inherited |= {endpoint.stdin, *endpoint.pass_fds}
        if endpoint.stdout is not None:
            inherited.add(endpoint.stdout)
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__)), "peer"],
        pass_fds=tuple(inherited),
        env={**os.environ, _PEERS_ENV: json.dumps({"gate": gate, "each": each, "places": places})},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    for endpoint in endpoints:
        endpoint.spawned()
    return process


def be_peers() -> None:
    """Be the workers of one peer process: greet, then send at every opening of the gate, in turns."""
    settings: dict[str, Any] = json.loads(os.environ.pop(_PEERS_ENV))
    channels: list[RawChannel] = []
    for control, output, address in settings["places"]:
        os.environ[CHANNEL_ENV] = address
        channels.append(cast(RawChannel, connect(Stdio(control, -1 if output is None else output))))
    kind, body = encode(decode_step(10**15))
    each: int = settings["each"]
    for channel in channels:
        channel.send_raw(kind, body)
    for count in (max(1, each // 10), each):
        if not os.read(settings["gate"], 1):
            break
        for _ in range(count):
            for channel in channels:
                channel.send_raw(kind, body)
    os.read(settings["gate"], 1)
    os._exit(0)  # the pool's side is closed already


def _main() -> None:
    if sys.argv[1] == "peer":
        pin("worker")
        be_peers()
        return
    pin("pool")
    tasks = [msgspec.json.decode(words, type=CrowdTask) for words in sys.argv[1:]]
    samples = [sample for task in tasks for sample in run(task.loop, gather(task))]
    sys.stdout.write(msgspec.json.encode(samples).decode())


if __name__ == "__main__":
    _main()
