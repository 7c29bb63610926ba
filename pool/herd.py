"""The Herd: the one owner of every model, worker and request of a pool.

All of its state changes in plain methods on one event loop: a call, a message or an exit comes in, the lifecycle table
says what it means, the scheduler says what follows, and the effects are sent. Nothing waits in between, so nothing can
change in between.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Coroutine, Iterable, Mapping
from typing import Any, Final

from llamaherd.pool.clocks import Clocks, now
from llamaherd.pool.config import ModelSpec
from llamaherd.pool.entry import Entry, Request, explain_backoff, explain_exit, explain_failure, explain_wait
from llamaherd.pool.errors import BadRequest, ModelBusy, PoolClosed, PoolError, WorkerFailed
from llamaherd.pool.events import EventLog
from llamaherd.pool.idle import Rest
from llamaherd.pool.launch import Exit, Launcher
from llamaherd.pool.lifecycle import RUNNING, IllegalTransition, State, Trigger, transition
from llamaherd.pool.machine import oom_kills
from llamaherd.pool.memory import expected_memory
from llamaherd.pool.schedule import Limits, Scheduler
from llamaherd.pool.status import ModelStatus, QueuedRequest
from llamaherd.pool.worker import Worker
from llamaherd.transport import Transport
from llamaherd.transport.errors import ChannelError
from llamaherd.transport.messages import (
    Cancel,
    ChildMessage,
    Delta,
    Done,
    Embed,
    Failed,
    Generate,
    Lora,
    Rerank,
    Result,
    Sleep,
    Stats,
    Threads,
    Tokens,
    Unknown,
    Vectors,
    Wake,
)
from llamaherd.transport.messages import State as StateMessage

__all__ = ["Herd"]

_log = logging.getLogger("llamaherd.pool")

#: The model of a worker that has none yet; no model's name is empty.
SPARE: Final = ""
#: Seconds from a load to the start of the next spare, and how often that is put off for a busy herd.
SPARE_SECONDS: Final = 0.5
SPARE_PATIENCE: Final = 20
#: Environment variable that tells a worker which engine to import before it is told to load; read by ``pool/child``.
PRELOAD_ENV: Final = "LLAMAHERD_PRELOAD"

#: Commands that a worker stops when it is told to; the others it answers at once.
_LONG: Final = (Generate, Embed, Rerank)
#: What the words of a worker's ``state`` message mean to the lifecycle.
_TRIGGERS: Final = {"loading": Trigger.PROGRESS, "ready": Trigger.READY, "sleeping": Trigger.SLEEP}


class Herd:
    """See the module's text. :class:`~llamaherd.pool.pool.Pool` is its public face and documents what callers may
    count on.

    Implements :class:`~llamaherd.pool.schedule.Effects` and :class:`~llamaherd.pool.worker.Owner`.
    """

    def __init__(
        self, transport: Transport, launcher: Launcher, *, limits: Limits, stop_timeout: float, spare: bool
    ) -> None:
        self.events = EventLog(lambda: {"models": [status.to_dict() for status in self.statuses()]})
        self._transport = transport
        self._launcher = launcher
        self._stop_timeout = stop_timeout
        self._budgeted = limits.memory_budget > 0
        self._scheduler = Scheduler(self, limits)
        self._clocks = Clocks(self._is_idle, self._on_rest)
        self._entries: dict[str, Entry] = {}
        self._names: dict[str, Entry] = {}
        self._requests: dict[int, Request] = {}
        self._numbers = itertools.count(1)
        self._generations = itertools.count(1)
        self._workers: set[Worker] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        #: An idle worker with the engine imported, for the next model that starts; None while there is none.
        self._spare: Worker | None = None
        self._keeps_spare = spare
        self._closing = False

    def __repr__(self) -> str:
        return f"<Herd over {self._transport.name}, {len(self._workers)} workers, {self._scheduler!r}>"

    def add(self, spec: ModelSpec) -> None:
        """A model exists from now on. Raises BadRequest if its spec is wrong or its name taken; nothing is added
        then.
        """
        spec.check()
        names = (spec.name, *spec.aliases)
        for name in names:
            if name in self._names:
                raise BadRequest(f"two models are called {name!r}: {self._names[name].name!r} and {spec.name!r}")
        if len(set(names)) < len(names):
            raise BadRequest(f"model {spec.name!r} has the same name twice")
        entry = Entry(spec)
        self._names.update((name, entry) for name in names)
        self._entries[spec.name] = entry
        self._scheduler.add(spec.name, slots=spec.options.n_parallel, pinned=spec.pinned)

    async def close(self) -> None:
        """Fail what waits or runs with ``PoolClosed``, stop all workers at once, and return when all are reaped."""
        self._closing = True
        for request in list(self._requests.values()):
            self.leave(request.number, PoolClosed("the pool is closing"))
        if self._spare is not None:
            self._spare.stop(self._stop_timeout)
        for entry in self._entries.values():
            self._clocks.stop(entry)
            self._stop_worker(entry)
        while self._workers or self._tasks:
            for worker in list(self._workers):
                await worker.wait()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._transport.aclose()
        self.events.close()

    def kill_all(self) -> None:
        """Kill every worker now; :meth:`close` then ends soon."""
        for worker in self._workers:
            worker.kill()

    # --- what may be read ---

    def find(self, name: str) -> Entry | None:
        """Return the model of that name or alias."""
        return self._names.get(name)

    def queued(self, entry: Entry) -> int:
        """Return how many requests wait for a model."""
        return self._scheduler.queued(entry.name) + len(entry.unsized)

    def status(self, entry: Entry) -> ModelStatus:
        """Return a model's public status."""
        name, scheduler = entry.name, self._scheduler
        return entry.status(scheduler.in_flight(name), self.waiting(entry), scheduler.memory(name))

    def waiting(self, entry: Entry) -> tuple[QueuedRequest, ...]:
        """Return the requests that wait for a model, in the order in which they will be served."""
        queue = self._scheduler.queue(entry.name)
        queue += [(number, self._requests[number].priority) for number in entry.unsized]
        return tuple(
            QueuedRequest(
                request=number, position=place, priority=priority, seconds=now() - self._requests[number].since
            )
            for place, (number, priority) in enumerate(queue, start=1)
        )

    def statuses(self) -> list[ModelStatus]:
        """Return every model's public status, in the order in which they were added."""
        return [self.status(entry) for entry in self._entries.values()]

    def wanted_at_start(self) -> list[str]:
        """Return the names of the models that are to be loaded when the pool opens."""
        return [entry.name for entry in self._entries.values() if entry.spec.load_on_startup]

    # --- requests ---

    def next_number(self) -> int:
        """Return a number for a new request."""
        return next(self._numbers)

    def accept(self, request: Request) -> None:
        """Take a request; its sink hears of it from now on, perhaps before this returns."""
        entry = request.entry
        if request.command is not None and entry.worker is None:
            seconds = entry.backoff.wait(now())
            if seconds > 0 and request.sink is not None:
                request.sink.fail(explain_backoff(entry, seconds))
                return
        self._requests[request.number] = request
        self._let_wait(request)
        if entry.sized:
            self._put(request)
        else:
            self._size(entry, request)
        self._clocks.mind(entry)

    def _let_wait(self, request: Request) -> None:
        request.since = now()
        if request.queue_timeout > 0:
            loop = asyncio.get_running_loop()
            request.patience = loop.call_later(request.queue_timeout, self._waited_too_long, request)

    def _waited_too_long(self, request: Request) -> None:
        waiting = self.waiting(request.entry)
        position = next((other.position for other in waiting if other.request == request.number), 0)
        self.leave(request.number, explain_wait(request, position, len(waiting)))

    def _size(self, entry: Entry, request: Request) -> None:
        """See to it that the scheduler knows what a model takes before a request for it can start it."""
        if not self._budgeted or entry.spec.memory is not None:
            entry.sized = True
            self._scheduler.resize(entry.name, entry.spec.memory or 0)
            self._put(request)
            return
        entry.unsized.append(request.number)
        if len(entry.unsized) == 1:
            self.keep(self._read_size(entry))

    async def _read_size(self, entry: Entry) -> None:
        # In a thread: the header of a model with a large vocabulary takes a good part of a second to read.
        memory = await asyncio.to_thread(expected_memory, entry.spec)
        waiting, entry.unsized, entry.sized = entry.unsized, [], True
        self._scheduler.resize(entry.name, memory)
        for number in waiting:
            request = self._requests.get(number)
            if request is not None:
                self._put(request)

    def _put(self, request: Request) -> None:
        holds = request.command is not None
        self._scheduler.request(request.number, request.entry.name, priority=request.priority, holds=holds)

    def leave(self, number: int, error: PoolError | None = None) -> None:
        """The caller of a request has left, or is told to with an error; what it held is freed. Unknown numbers are
        ignored.
        """
        request = self._requests.get(number)
        if request is None or request.sink is None:
            return
        sink, request.sink = request.sink, None
        if error is not None:
            sink.fail(error)
        request.stop_waiting()
        if not request.granted:
            del self._requests[number]
            if number in request.entry.unsized:
                request.entry.unsized.remove(number)
            self._scheduler.cancel(number)
            self._clocks.mind(request.entry)
        elif request.entry.worker is not None and isinstance(request.command, _LONG):
            # The model stays busy until the worker confirms: what still computes must not be taken for idle.
            request.entry.worker.post(Cancel(request=number))

    # --- commands ---

    def unload(self, entry: Entry) -> None:
        """Begin to stop a model's worker. Raises ModelBusy if it has none; no effect on one that is stopping."""
        if entry.state not in RUNNING:
            raise ModelBusy("model is not running", code="model_not_running")
        error = WorkerFailed(f"model {entry.name!r} was unloaded", code="unloaded")
        for request in self._granted_to(entry):
            self.leave(request.number, error)
        self._scheduler.unload(entry.name, error)

    def sleep(self, entry: Entry) -> None:
        """Have an idle worker free its model. Raises ModelBusy."""
        if entry.state is not State.LOADED or entry.worker is None or not self._scheduler.asleep(entry.name):
            raise ModelBusy(f"model {entry.name!r} is {entry.state} and cannot sleep now", code="model_busy")
        entry.drowsy = True
        entry.worker.post(Sleep())

    def scale(self, entry: Entry, scales: tuple[float, ...]) -> None:
        """Have a model's LoRA adapters applied with these factors, one for each, now and after every load."""
        entry.scales = scales
        if entry.worker is not None:
            entry.worker.post(Lora(scales=scales))

    def _granted_to(self, entry: Entry) -> list[Request]:
        return [request for request in self._requests.values() if request.entry is entry and request.granted]

    # --- effects: what the scheduler decided ---

    def start(self, model: str) -> None:
        if self._closing:
            return
        entry = self._entries[model]
        entry.state = transition(entry.state, Trigger.SPAWN)
        entry.progress = entry.failure = entry.error = entry.exit_code = None
        entry.drowsy = entry.waking = False
        entry.keep_alive = None
        entry.oom_kills = oom_kills()
        spare = self._take_spare()
        worker = entry.worker = spare or self._new_worker(model)
        entry.adopted = spare is not None
        worker.model = model
        worker.post(entry.spec.to_load(entry.scales))
        self.events.emit(model, "model_status", {"status": State.LOADING})
        self._clocks.watch_load(entry, worker)
        if spare is None:
            self.keep(self._launch(worker))

    def stop(self, model: str) -> None:
        self._stop_worker(self._entries[model])

    def wake(self, model: str) -> None:
        entry = self._entries[model]
        entry.drowsy, entry.waking = False, True
        if entry.worker is not None:
            entry.worker.post(Wake())
            self._clocks.watch_load(entry, entry.worker)

    def grant(self, ticket: int) -> None:
        request = self._requests[ticket]
        request.granted = True
        request.stop_waiting()
        entry = request.entry
        if request.command is None:
            del self._requests[ticket]
            if request.sink is not None:
                request.sink.finish(None)
        elif entry.worker is not None:
            entry.worker.post(request.command)

    def reject(self, ticket: int, error: PoolError) -> None:
        request = self._requests.pop(ticket)
        request.stop_waiting()
        sink, request.sink = request.sink, None
        if sink is not None:
            sink.fail(error)

    def threads(self, model: str, n: int) -> None:
        entry = self._entries[model]
        # A number that the user chose stays.
        if entry.worker is not None and entry.spec.options.n_threads <= 0:
            entry.worker.post(Threads(n=n))

    def _stop_worker(self, entry: Entry) -> None:
        if entry.worker is None or entry.state is State.STOPPING:
            return
        timeout = self._stop_timeout if entry.spec.stop_timeout is None else entry.spec.stop_timeout
        # A load cannot be asked to hurry, and has nothing to lose.
        self._clocks.stop(entry)
        entry.worker.stop(0.0 if entry.state is State.LOADING or entry.waking else timeout)
        entry.state = transition(entry.state, Trigger.STOP)

    def _new_worker(self, model: str) -> Worker:
        worker = Worker(model, next(self._generations), self)
        self._workers.add(worker)
        return worker

    async def _launch(self, worker: Worker, env: Mapping[str, str] | None = None) -> None:
        try:
            await worker.launch(self._launcher, self._transport, lambda data: self._on_log(worker, data), env)
        except Exception as error:  # a launcher may be anyone's, and whatever it raises must reach those who wait
            expected = isinstance(error, OSError | ChannelError)
            _log.warning("%r could not be started: %s", worker, error, exc_info=not expected)
            end = Exit(reason="exited", code=None, signal=None, node="", detail=f"it could not be started: {error}")
            self.on_exit(worker, end)

    def _take_spare(self) -> Worker | None:
        spare = self._spare
        if spare is None or spare.pid is None:
            return None
        self._spare = None
        return spare

    def keep_spare(self) -> None:
        """Start a spare worker, if the herd keeps one and has none. Called when the pool opens."""
        if self._keeps_spare and self._spare is None and not self._closing:
            self._spare = self._new_worker(SPARE)
            self.keep(self._launch(self._spare, {PRELOAD_ENV: "llama"}))

    def _replace_spare(self, patience: int = SPARE_PATIENCE) -> None:
        """Start a new spare when the load that took the last one, and what it was for, have had their time: a starting
        interpreter would take a core from them.
        """
        if self._keeps_spare and self._spare is None and not self._closing:
            asyncio.get_running_loop().call_later(SPARE_SECONDS, self._spare_due, patience)

    def _spare_due(self, patience: int) -> None:
        if patience > 0 and self._scheduler.busy:
            self._replace_spare(patience - 1)
        else:
            self.keep_spare()

    def keep(self, work: Coroutine[object, object, None]) -> None:
        """Run a coroutine that the close of the herd waits for."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- news of workers ---

    def _feed(self, entry: Entry, deltas: Iterable[Delta]) -> None:
        for delta in deltas:
            request = self._requests.get(delta.request)
            if request is not None and request.sink is not None and request.is_with(entry):
                request.answered = True
                request.sink.feed(delta)

    def on_message(self, worker: Worker, message: ChildMessage) -> None:
        entry = self._entries.get(worker.model)
        if entry is None or entry.worker is not worker:
            return
        match message:
            case Tokens():
                self._feed(entry, message.deltas)
                if message.typed:
                    self._feed(entry, message.typed)
            case Vectors():
                for vector in message.vectors:
                    request = self._requests.get(vector.request)
                    if request is not None and request.sink is not None and request.is_with(entry):
                        request.sink.feed(vector)
            case Done() | Result():
                self._end(entry, message.request, message)
            case Failed(request=None):
                entry.failure = message
            case Failed():
                self._end(entry, message.request, explain_failure(message))
            case StateMessage():
                self._on_state(entry, message)
            case Stats():
                if entry.spec.memory is None and message.rss_bytes > 0:
                    self._scheduler.resize(entry.name, message.rss_bytes, measured=True)
            case Unknown():
                _log.warning("%r sent a %r that means nothing here: %s", worker, message.kind, message.reason)

    def _end(self, entry: Entry, number: int | None, end: Done | Result | PoolError) -> None:
        request = self._requests.get(number) if number is not None else None
        if request is None or not request.is_with(entry):
            return  # it has ended, or is none of this worker's business
        del self._requests[request.number]
        if request.sink is not None:
            if isinstance(end, PoolError):
                request.sink.fail(end)
            else:
                request.sink.finish(end)
        request.entry.keep_alive = request.keep_alive
        self._scheduler.finish(request.number)
        self._clocks.mind(request.entry)

    def _on_log(self, worker: Worker, data: bytes) -> None:
        entry = self._entries.get(worker.model)
        if entry is not None:
            entry.heard = now()
            entry.log.feed(data)

    def _on_state(self, entry: Entry, message: StateMessage) -> None:
        trigger = _TRIGGERS.get(message.state)
        try:
            if trigger is None:
                raise IllegalTransition(f"unknown state {message.state!r}")
            entry.state = transition(entry.state, trigger)
        except IllegalTransition as reason:
            _log.debug("ignored a state message of %r: %s", entry.worker, reason)
            return
        entry.heard = now()
        data: dict[str, Any] = {"status": entry.state}
        if trigger is Trigger.PROGRESS:
            entry.progress = data["progress"] = message.payload
        elif trigger is Trigger.READY:
            entry.progress = entry.failure = None
            entry.waking = False
            self._clocks.forget_load(entry)
            entry.backoff.succeeded()
            if message.payload:
                entry.info = data["info"] = {"created": int(time.time()), **message.payload}
        self.events.emit(entry.name, "status_change", data)
        if trigger is Trigger.READY:
            self._scheduler.ready(entry.name)
            self._replace_spare()
        self._clocks.mind(entry)

    def on_exit(self, worker: Worker, end: Exit) -> None:
        self._workers.discard(worker)
        if worker is self._spare:
            self._spare = None  # the next load brings a new one
            return
        entry = self._entries[worker.model]
        # A spare that was dead or dying when it was taken says nothing about the model.
        stillborn = entry.adopted and entry.progress is None and entry.failure is None and not worker.stopping
        error = None if worker.stopping or stillborn else explain_exit(entry, worker, end)
        entry.log.end_line()
        loading = entry.state is State.LOADING or entry.waking
        entry.waking = False
        self._clocks.forget_load(entry)
        entry.state = transition(entry.state, Trigger.EXIT)
        entry.worker, entry.progress, entry.exit_code, entry.error = None, None, end.code, error
        if loading and error is not None:
            entry.backoff.failed(now())
        self._clocks.mind(entry)
        again = self._lose_granted(entry, error, retry=not loading and error is not None)
        self.events.emit(entry.name, "status_change", {"status": entry.state, "exit_code": end.code})
        self._scheduler.exited(entry.name, error if loading else None)
        for request in again:
            self._let_wait(request)
            self._put(request)

    def _lose_granted(self, entry: Entry, error: PoolError | None, *, retry: bool) -> list[Request]:
        """Fail the requests that a worker took with it. Return those that deserve a second worker: nothing of their
        answer is out, and this was their first.
        """
        again: list[Request] = []
        for request in self._granted_to(entry):
            if request.sink is not None and retry and not request.answered and not request.retried:
                request.granted, request.retried = False, True
                again.append(request)
                continue
            del self._requests[request.number]
            if request.sink is not None:
                gone = error or WorkerFailed(f"model {entry.name!r} was stopped", code="unloaded")
                request.sink.fail(gone)
        return again

    # --- rest ---

    def _is_idle(self, entry: Entry) -> bool:
        return not self._scheduler.in_flight(entry.name) and not self._scheduler.queued(entry.name)

    def _on_rest(self, entry: Entry, rest: Rest) -> None:
        if rest.action == "sleep":
            self.sleep(entry)
        else:
            self.unload(entry)
