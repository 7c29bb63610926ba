"""A long disorder: callers, commands, reloads and kills over a few models with limits, and what must hold in it."""

import asyncio
import contextlib
import os
import random
import re
import signal
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import psutil

from herding import fake, until
from llamaherd.pool import BrokenModel, Generation, ModelBusy, ModelSpec, ModelStatus, Pool, PoolError, State
from patience import patience

__all__ = ["Soak"]

MIB = 1024 * 1024
MODELS_MAX = 4
BUDGET = 12 * MIB
CALLERS = 10
#: Seconds of disorder between two rests, at which everything must be as in the beginning.
ROUND_SECONDS = 15.0
#: Seconds after which a request counts as lost, and the disorder as stuck; see ``patience``.
PATIENCE = 60.0
#: What the manager holds of one connected worker, by transport and by what each descriptor is: the process, and
#: pipes to its stdin and from its stderr; beside these ``pipe`` has a pipe each way, ``stdio`` the one from its stdout,
#: and ``zmq`` the connections of its two sockets.
OF_A_WORKER = {
    "pipe": Counter({"pidfd": 1, "pipe": 4}),
    "stdio": Counter({"pidfd": 1, "pipe": 3}),
    "zmq": Counter({"pidfd": 1, "pipe": 2, "socket": 2}),
}
#: Most seconds between two doings of one actor.
PAUSE = 0.05
#: Most seconds until all but the killer fall silent, and for how long they do: that is when the spare loads ahead.
LULL_AFTER, LULL_SECONDS = 6.0, 2.0
#: What ``/proc`` says of a descriptor that is no file: ``pipe:[12]``, ``socket:[12]``, ``anon_inode:[pidfd]``.
_KIND = re.compile(r"anon_inode:\[?(?P<inode>[^\]]+)\]?|(?P<kind>\w+):\[\d+\]")


class Soak:
    """Runs the disorder and counts what it does.

    Args:
        folder: For the files that stand for pieces of memory.
        seed: Of every choice; what the processes make of it is theirs.
        transport: How the workers are spoken to.
    """

    def __init__(self, folder: Path, seed: int, transport: str) -> None:
        self._random = random.Random(seed)
        self._transport = transport
        self._pieces = (str(folder / "the only piece"),)
        self._catalogue = self._first_catalogue()
        self._pool = Pool(
            self._catalogue,
            transport=transport,
            models_max=MODELS_MAX,
            memory_budget=BUDGET,
            queue_max=40,
            stop_timeout=2.0,
            spare=True,
        )
        self._calm = True
        self._lively = asyncio.Event()
        self._outstanding = 0
        self.done: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.loads_ahead = self.handovers = 0
        self.most_processes = 0
        self.rounds = 0

    def _first_catalogue(self) -> list[ModelSpec]:
        replace = msgspec.structs.replace
        return [
            replace(fake("plain", step_seconds=0.001), memory=2 * MIB),
            replace(fake("replicated", n_parallel=2, step_seconds=0.001), memory=2 * MIB, replicas=2),
            replace(fake("pinned", step_seconds=0.001), memory=2 * MIB, pinned=True),
            replace(fake("sleeper", step_seconds=0.001), memory=3 * MIB, sleep_idle_seconds=0.02),
            replace(fake("guest", memory=self._pieces, load_seconds=0.05), memory=3 * MIB, unload_idle_seconds=0.02),
            replace(fake("large", memory=self._pieces, step_seconds=0.001), memory=6 * MIB),
        ]

    async def run(self, seconds: float) -> None:
        """Let disorder reign for so many seconds, with rests between the rounds. What is wrong is in ``wrong``."""
        deadline = time.monotonic() + seconds
        before = _descriptors()
        async with self._pool:
            opened = _descriptors()  # the spare is not there yet
            await self._rest(opened)
            while time.monotonic() < deadline and not self.wrong:
                await self._disorder(min(ROUND_SECONDS, max(1.0, deadline - time.monotonic())))
                await self._rest(opened)
                self.rounds += 1
        if (after := _descriptors()) != before:
            self.wrong.append(f"descriptors are left, or gone: {_difference(after, before)}")
        left = psutil.Process().children(recursive=True)
        if left:
            self.wrong.append(f"processes are left: {left}")

    def report(self, seconds: float) -> str:
        """Return the figures."""
        done = ", ".join(f"{count} {what}" for what, count in sorted(self.done.items()))
        ends = ", ".join(f"{count} {what}" for what, count in sorted(self.outcomes.items()))
        rss = psutil.Process().memory_info().rss // MIB
        return (
            f"soak: {seconds:.0f} s, {self.rounds} rounds, {sum(self.done.values())} operations: {done}\n"
            f"ends of requests: {ends}\n"
            f"loads ahead: {self.loads_ahead}; processes seen to change hands: {self.handovers}; most processes at a "
            f"time: {self.most_processes}; the manager's memory: {rss} MiB; wrong: {'; '.join(self.wrong) or 'nothing'}"
        )

    # --- a round ---

    async def _disorder(self, seconds: float) -> None:
        self._calm = False
        self._lively.set()
        actors: list[Callable[[], Awaitable[None]]] = [self._call] * CALLERS
        actors += [self._command, self._command, self._reload, self._kill, self._lull]
        tasks = [asyncio.ensure_future(self._act(actor)) for actor in actors]
        watching = asyncio.ensure_future(self._watch())
        await asyncio.wait(tasks, timeout=seconds)
        self._calm = True
        with contextlib.suppress(TimeoutError):
            async with patience(2 * PATIENCE):
                await asyncio.wait(tasks)
        stuck = [task for task in tasks if not task.done()]
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        if stuck:
            self.wrong.append(f"{len(stuck)} actors are stuck; {self._pool!r}")
        for task in tasks:
            if task in stuck:
                task.cancel()
            elif error := task.exception():
                self.wrong.append("unexpected: " + "".join(traceback.format_exception(error)))

    async def _act(self, actor: Callable[[], Awaitable[None]]) -> None:
        while not self._calm and not self.wrong:
            if actor not in (self._kill, self._lull):
                await self._lively.wait()
            await actor()
            await asyncio.sleep(self._random.random() * PAUSE)

    async def _rest(self, opened: Counter[str]) -> None:
        """Let everything come to rest and leave. What is open then is what the pool had opened without any worker, and
        what belongs to the spare.
        """
        self._pool.reload(self._catalogue)
        names = {spec.name for spec in self._catalogue}
        pool, me = self._pool, psutil.Process()

        def idle() -> bool:
            return {status.name for status in pool.models()} == names and all(
                status.in_flight == status.queued == 0 for status in pool.models()
            )

        def gone() -> bool:
            for status in pool.models():
                if status.state not in (State.UNLOADED, State.STOPPING):
                    pool.start_unload(status.name)  # a pinned one may come back once more
            return all(status.state is State.UNLOADED for status in pool.models())

        try:
            await until(idle, "no request is left")
            await until(gone, "every worker is gone")
            # One that was killed is replaced by the next load and no sooner.
            await until(lambda: len(me.children()) <= 1, "only the spare is left")
        except AssertionError as error:
            self.wrong.append(f"{error}; {pool.models()}; {me.children()}")
            return
        each = OF_A_WORKER[self._transport]

        def due() -> Counter[str]:
            workers = len(me.children())
            return opened + Counter({kind: count * workers for kind, count in each.items()})

        try:
            await until(lambda: _descriptors() == due())  # the spare may be about to connect
        except AssertionError:
            self.wrong.append(f"descriptors of nobody in round {self.rounds}: {_difference(_descriptors(), due())}")

    async def _watch(self) -> None:
        before = ""
        homes: dict[int, str] = {}
        while not self.wrong:
            statuses = self._pool.models()
            workers = [one for status in statuses for one in status.replicas if one.pid is not None]
            found = {one.pid: status.name for status in statuses for one in status.replicas if one.pid is not None}
            self.handovers += sum(homes.get(pid, name) != name for pid, name in found.items())
            homes = found
            running = [one for one in workers if one.state is not State.STOPPING]
            self.most_processes = max(self.most_processes, len(workers))
            ahead = self._pool.counts().ahead
            self.loads_ahead += ahead not in ("", before)
            before = ahead
            held = sum(status.memory for status in statuses if any(one.pid for one in status.replicas))
            held += sum(spec.memory or 0 for spec in self._catalogue if spec.name == ahead)
            waiting = sum(status.in_flight + status.queued for status in statuses)
            if len(running) > MODELS_MAX:
                self.wrong.append(f"{len(running)} processes run: {running}")
            if held > BUDGET:
                self.wrong.append(f"{held} bytes are taken, {ahead!r} is loaded ahead: {statuses}")
            if any(one.error is None and one.exit_code == 4 for one in workers):
                self.wrong.append(f"an engine broke: {workers}")
            if waiting > self._outstanding + CALLERS:  # those who left may still be on their way out
                self.wrong.append(f"{waiting} requests are known and {self._outstanding} were made")
            await asyncio.sleep(PAUSE / 5)

    # --- actors ---

    async def _lull(self) -> None:
        await asyncio.sleep(self._random.random() * LULL_AFTER)
        self._lively.clear()
        await asyncio.sleep(LULL_SECONDS)
        self._lively.set()

    async def _call(self) -> None:
        name = self._random.choice(self._catalogue).name
        words = [f"{self._random.random():.6f}" for _ in range(self._random.randrange(1, 40))]
        leaves = self._random.random() < 0.3
        limit = self._random.choice((0.0, 0.0, 0.0, 0.5))
        self.done["requests"] += 1
        self._outstanding += 1
        said: list[str] = []
        try:
            async with patience(PATIENCE):
                generation = self._pool.complete(
                    name, " ".join(words), priority=self._random.randrange(3), queue_timeout=limit
                )
                outcome = await (self._leave(generation, said) if leaves else self._hear(generation, said))
            if outcome == "answered" and "".join(said) != " ".join(words):
                self.wrong.append(f"{' '.join(words)!r} was answered with {''.join(said)!r}")
        except TimeoutError:
            outcome = "lost"
            self.wrong.append(f"a request for {name} had no end after {PATIENCE} s: {self._pool.models()}")
        except PoolError as error:
            outcome = error.code or type(error).__name__
        finally:
            self._outstanding -= 1
        if not " ".join(words).startswith("".join(said)):
            self.wrong.append(f"{' '.join(words)!r} was answered with {''.join(said)!r}")
        self.outcomes[outcome] += 1

    async def _hear(self, generation: Generation, said: list[str]) -> str:
        async for piece in generation:
            said.append(piece.text)
        return "answered"

    async def _leave(self, generation: Generation, said: list[str]) -> str:
        self.done["departures"] += 1
        pieces = self._random.randrange(0, 20)
        async with generation:
            if self._random.random() < 0.5:
                await asyncio.sleep(self._random.random() * PAUSE)  # may be gone before anything came
                return "left"
            async for piece in generation:
                said.append(piece.text)
                if len(said) > pieces:
                    return "left"
        return "answered"

    async def _command(self) -> None:
        pool, name = self._pool, self._random.choice(self._catalogue).name
        what = self._random.choice(("load", "unload", "sleep"))
        self.done[f"{what} commands"] += 1
        with contextlib.suppress(PoolError):
            async with patience(PATIENCE):
                if what == "load":
                    await pool.load(name)
                elif what == "unload":
                    await pool.unload(name)
                else:
                    with contextlib.suppress(ModelBusy):
                        pool.start_sleep(name)

    async def _reload(self) -> None:
        await asyncio.sleep(self._random.random() * 3)
        self.done["reloads"] += 1
        self._pool.reload([self._disturbed(spec) for spec in self._catalogue if self._random.random() > 0.1])

    def _disturbed(self, spec: ModelSpec) -> ModelSpec | BrokenModel:
        match self._random.randrange(8):
            case 0:
                return BrokenModel(name=spec.name, reason="the soak broke it")
            case 1:
                return msgspec.structs.replace(spec, script=spec.script | {"load_steps": self._random.randrange(2, 6)})
            case 2:
                return msgspec.structs.replace(spec, priority=self._random.randrange(5), replicas=1)
            case _:
                return spec

    async def _kill(self) -> None:
        await asyncio.sleep(self._random.random())
        statuses: list[ModelStatus] = self._pool.models()
        pids = [one.pid for status in statuses for one in status.replicas if one.pid is not None]
        pids += [child.pid for child in psutil.Process().children() if child.pid not in pids]  # the spare
        if pids:
            self.done["kill -9"] += 1
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._random.choice(pids), signal.SIGKILL)


def _descriptors() -> Counter[str]:
    """Return how many descriptors this process has, by what they are: files by their paths, all else by its kind."""
    kinds: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one of the list itself
            target = os.readlink(f"/proc/self/fd/{name}")
            found = _KIND.fullmatch(target)
            kinds[target if found is None else found["inode"] or found["kind"]] += 1
    return kinds


def _difference(held: Counter[str], due: Counter[str]) -> dict[str, int]:
    return {kind: held[kind] - due[kind] for kind in sorted(held | due) if held[kind] != due[kind]}
