"""Robustness as a measurement: what is lost, torn, forged or late when something misbehaves.

``python transport_faults.py TASK...`` prints the samples as JSON. The faults:

* *flood*: native code prints on the worker's descriptors 1 and 2 without pause while it sends numbered states;
* *stall*: the worker reads nothing for a while, and the pool goes on sending it commands; beside it another worker
  sends states, which must not be late;
* *busy*: the pool's thread does nothing for a while, and the worker goes on sending states.
"""

import asyncio
import os
import sys
import threading
import time
from typing import Any, Final

import msgspec

from llamaherd.transport.messages import ChildMessage, Result, State, Threads, Tokenize
from pinning import pin
from samples import Sample
from transport_merged import read_states, start_merged, write_commands
from transport_world import Peer, open_world, run
from workload import numbered_state

__all__ = ["FAULTS", "MERGED", "FaultTask"]

FAULTS: Final = ("flood", "stall", "busy")
#: The reference's way, with its writer's newline before the prefix and without.
MERGED: Final = ("merged", "merged, no newline first")

#: A state that arrives later than this after its sending counts as late, in milliseconds.
LATE_MS: Final = 100
_COMMAND_SIZE: Final = 1000
_READ_BYTES: Final = 64 * 1024


class FaultTask(msgspec.Struct, frozen=True):
    """What to measure: ``count`` messages; stalls and busy spells last ``seconds``."""

    transport: str
    loop: str
    fault: str
    count: int
    seconds: float


class Ledger:
    """Judges each state that arrives against what was sent."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._seen: set[int] = set()
        self._torn = self._forged = self._late = self._again = 0
        self._worst_ms = 0.0

    def book(self, state: ChildMessage) -> None:
        """Take one message that looks like a state."""
        now = time.monotonic_ns()
        payload = state.payload if isinstance(state, State) and state.state == "loading" else None
        if payload is None:
            known = isinstance(state, State) and state.state == "forged"
            self._forged += known
            self._torn += not known
            return
        number, stamp = payload.get("number"), payload.get("stamp")
        if not isinstance(number, int) or not isinstance(stamp, int) or state != numbered_state(number, stamp):
            self._torn += 1
            return
        self._again += number in self._seen
        self._seen.add(number)
        delay = (now - stamp) / 1e6
        self._late += delay > LATE_MS
        self._worst_ms = max(self._worst_ms, delay)

    def complete(self) -> bool:
        return len(self._seen) >= self._count

    def values(self) -> dict[str, float]:
        return {
            "sent": self._count,
            "received": len(self._seen),
            "lost": self._count - len(self._seen),
            "torn": self._torn,
            "forged": self._forged,
            "again": self._again,
            "late": self._late,
            "worst_ms": self._worst_ms,
        }


async def take_states(peer: Peer, ledger: Ledger) -> None:
    """Book every message until the peer's report."""
    while True:
        message = await peer.one()
        if isinstance(message, Result) and message.request == 0:
            return
        ledger.book(message)


async def flood(task: FaultTask) -> Ledger:
    log, their_log = os.pipe()
    sink = threading.Thread(target=_swallow, args=(log,))
    sink.start()
    ledger = Ledger(task.count)
    try:
        async with open_world(task.transport) as world:
            peer = await world.start(stderr=their_log)
            os.close(their_log)
            their_log = -1
            await peer.begin("flood", count=task.count)
            await take_states(peer, ledger)
            await peer.stop()
    finally:
        if their_log >= 0:
            os.close(their_log)
        sink.join()
    return ledger


def _swallow(fd: int) -> None:
    """Read a log as fast as it comes, as a pool must."""
    while os.read(fd, _READ_BYTES):
        pass
    os.close(fd)


async def busy(task: FaultTask) -> Ledger:
    ledger = Ledger(task.count)
    async with open_world(task.transport) as world:
        peer = await world.start()
        await peer.begin("states", count=task.count, rate=_rate(task))
        ledger.book(await peer.one())
        time.sleep(task.seconds)  # noqa: ASYNC251 - this is the fault
        await take_states(peer, ledger)
        await peer.stop()
    return ledger


def _rate(task: FaultTask) -> float:
    """Return the messages a second with which sending takes half as long again as the fault."""
    return task.count / (1.5 * task.seconds)


async def stall(task: FaultTask) -> dict[str, float]:
    """Count commands as sent, received and lost, and the neighbour's states as late."""
    neighbours = Ledger(task.count)
    async with open_world(task.transport) as world:
        peer, neighbour = await world.start(), await world.start()
        await neighbour.begin("states", count=task.count, rate=_rate(task))
        listening = asyncio.create_task(take_states(neighbour, neighbours))
        await peer.begin("stall", seconds=task.seconds, count=task.count)
        text = "x" * _COMMAND_SIZE
        for number in range(task.count):
            await peer.channel.send(Tokenize(request=number, text=text))
        await peer.channel.send(Threads(n=0))
        report = await peer.report()
        await listening
        for each in (peer, neighbour):
            await each.stop()
    values = neighbours.values()
    received = report["received"]
    # The neighbour's states are held to the same: one that is lost or torn would show here.
    lost = task.count - received + values["lost"]
    return {**values, "received": received, "lost": lost}


# --- the reference's way ----------------------------------------------------------------------------------------------


def merged(task: FaultTask) -> dict[str, float]:
    """The same faults on one pipe for everything, read by a thread that does nothing else."""
    ledger = Ledger(task.count)
    settings: dict[str, Any] = {"count": task.count, "seconds": task.seconds}
    if task.fault == "busy":
        settings["rate"] = _rate(task)
    work = "states" if task.fault == "busy" else task.fault
    with start_merged(work, settings, bare=task.transport != MERGED[0]) as worker:
        assert worker.stdin is not None and worker.stdout is not None
        if task.fault == "stall":
            write_commands(worker.stdin, task.count, _COMMAND_SIZE)
            counts = [msgspec.json.decode(body, type=dict[str, int]) for body in read_states(worker.stdout)]
            received = counts[0]["received"] if counts else 0
            return {**Ledger(task.count).values(), "received": received, "lost": task.count - received}
        for number, body in enumerate(read_states(worker.stdout)):
            ledger.book(_parsed(body))
            if number == 0 and task.fault == "busy":
                time.sleep(task.seconds)
    return ledger.values()


def _parsed(body: bytes) -> ChildMessage:
    try:
        return msgspec.json.decode(body, type=State)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return State(state="torn")


def measure(task: FaultTask) -> list[Sample]:
    """Run the task's fault."""
    if task.transport in MERGED:
        values = merged(task)
    elif task.fault == "stall":
        values = run(task.loop, stall(task))
    else:
        ledger = run(task.loop, flood(task) if task.fault == "flood" else busy(task))
        values = ledger.values()
    return [Sample("fault", task.transport, task.loop, task.fault, values)]


def _main() -> None:
    pin("pool")
    tasks = [msgspec.json.decode(words, type=FaultTask) for words in sys.argv[1:]]
    samples = [sample for task in tasks for sample in measure(task)]
    sys.stdout.write(msgspec.json.encode(samples).decode())


if __name__ == "__main__":
    _main()
