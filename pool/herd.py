"""The Herd: the one owner of every model, worker and request of a pool.

All of its state changes in plain methods on one event loop: a call, a message or an exit comes in, the lifecycle table
says what it means, the scheduler says what follows, and the effects are sent. Nothing waits in between, so nothing can
change in between.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Iterable
from typing import Any, Final

import msgspec

from llamaherd.pool.affinity import prefix_keys
from llamaherd.pool.clocks import Clocks, now
from llamaherd.pool.config import ModelSpec
from llamaherd.pool.counts import Abandoned, PoolCounts
from llamaherd.pool.downloads import Downloads
from llamaherd.pool.entry import Entry, Nobody, Replica, Request, Stream
from llamaherd.pool.errors import DownloadFailed, ModelBusy, ModelNotLoaded, PoolClosed, PoolError, WorkerFailed
from llamaherd.pool.events import EventLog
from llamaherd.pool.explain import (
    explain_backoff,
    explain_broken,
    explain_download,
    explain_exit,
    explain_failure,
    explain_removal,
    explain_wait,
    ran_out_of_memory,
)
from llamaherd.pool.gpus import Gpu, Gpus
from llamaherd.pool.idle import Rest
from llamaherd.pool.launch import Exit, Launcher
from llamaherd.pool.lifecycle import RUNNING, IllegalTransition, State, Trigger, transition
from llamaherd.pool.machine import oom_kills
from llamaherd.pool.outlook import Outlook, load_of
from llamaherd.pool.preparation import Preparation
from llamaherd.pool.registry import Registry
from llamaherd.pool.reload import CatalogModel, ReloadReport
from llamaherd.pool.report import status_of
from llamaherd.pool.revival import Revivals
from llamaherd.pool.schedule import Limits, Scheduler
from llamaherd.pool.staff import Staff
from llamaherd.pool.status import ModelStatus, QueuedRequest
from llamaherd.pool.supply import Supply
from llamaherd.pool.worker import Worker
from llamaherd.transport import Transport
from llamaherd.transport.messages import (
    Cancel,
    ChildMessage,
    Delta,
    Done,
    Embed,
    Failed,
    Generate,
    Lora,
    PromptProgress,
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
from llamaherd.transport.messages import Sequence as SlotCommand
from llamaherd.transport.messages import State as StateMessage

__all__ = ["Herd"]

_log = logging.getLogger("llamaherd.pool")


#: Commands that a worker stops when it is told to; the others it answers at once.
_LONG: Final = (Generate, Embed, Rerank, SlotCommand)
#: Kinds of messages that somebody may wait for, who has to be told if one cannot be read.
_ANSWERS: Final = frozenset({"tokens", "vectors", "done", "result", "failed"})
#: What the words of a worker's ``state`` message mean to the lifecycle.
_TRIGGERS: Final = {"loading": Trigger.PROGRESS, "ready": Trigger.READY, "sleeping": Trigger.SLEEP}


class Herd:
    """See the module's text. :class:`~llamaherd.pool.pool.Pool` is its public face and documents what callers may
    count on.

    Implements :class:`~llamaherd.pool.effects.Effects` and :class:`~llamaherd.pool.staff.Employer`.
    """

    def __init__(
        self,
        transport: Transport,
        launcher: Launcher,
        *,
        limits: Limits,
        stop_timeout: float,
        spare: bool,
        reuse_workers: bool = True,
        gpus: tuple[Gpu, ...] = (),
        gpu_memory: Gpus | None = None,
        lenient: bool = False,
    ) -> None:
        self.events = EventLog(lambda: {"models": [status.to_dict() for status in self.statuses()]})
        self.downloads = Downloads(transport, launcher, self.events, self._next_generation)
        self._transport = transport
        self._gpus = gpus
        self._gpu_memory = gpu_memory
        self._scheduler = Scheduler(self, limits)
        self._abandoned: dict[str, Abandoned] = {}
        self._clocks = Clocks(self._is_idle, self._on_rest)
        self._registry = Registry(self._scheduler, self.events, self._turn_away, self._take_back, self._clocks.mind)
        self._supply = Supply(self.downloads, self._registry.adopt)
        #: The registry's own, to be read.
        self._entries: Final = self._registry.entries
        self._requests: dict[int, Request] = {}
        self._numbers = itertools.count(1)
        self._generations = itertools.count(1)
        self._outlook = Outlook(self._scheduler, self._entries)
        self._preparation = Preparation(
            self._scheduler,
            self._supply,
            self._entries,
            limits,
            gpus,
            lenient=lenient,
            go_on=self._put_all,
            go_without=self._go_without,
        )
        self._revivals = Revivals(self._revive, self._let_grow, lambda: self._closing)
        self._staff = Staff(
            self,
            transport,
            launcher,
            stop_timeout=stop_timeout,
            next_generation=self._next_generation,
            spare=spare,
            reuse=reuse_workers,
            adopts=not gpus,
            is_busy=lambda: bool(self._requests),
            look_ahead=self._outlook.choose,
            give_up=self._scheduler.give_up_ahead,
            gone=self._scheduler.ahead_gone,
        )
        #: The staff's own, to be read.
        self._homes: Final = self._staff.homes
        self._spares: Final = self._staff.spares
        self._at_rest = asyncio.Event()
        self._closing = False

    def __repr__(self) -> str:
        return f"<Herd over {self._transport.name}, {len(self._staff)} workers, {self._scheduler!r}>"

    # --- the catalogue ---

    def add(self, spec: ModelSpec) -> None:
        """A model exists from now on. Raises BadRequest if its spec is wrong or its name taken; nothing is added
        then.
        """
        self._registry.add(spec)

    def reload(self, models: Iterable[CatalogModel]) -> ReloadReport:
        """Take a new catalogue in the place of the old one. Raises BadRequest, and changes nothing, if it is none."""
        report = self._registry.reload(models)
        self._supply.mind(self._entries)
        self._recheck_ahead()
        return report

    def _take_back(self, entry: Entry) -> None:
        """A model has become another: have those who wait for it with the scheduler wait until it is prepared, since
        they have to start what it is now, and so once that is there and by what it takes.
        """
        if not self._scheduler.queued(entry.name) or (
            entry.spec.missing() is None and self._preparation.is_told(entry)
        ):
            return
        for number, _ in self._scheduler.queue(entry.name):
            self._scheduler.cancel(number)
            self._preparation.put(entry, number)

    def _turn_away(self, entry: Entry, error: PoolError) -> None:
        for request in list(self._requests.values()):
            if request.entry is entry and request.replica is None:
                self.leave(request.number, error)

    # --- the end ---

    async def rest(self) -> None:
        """Wait until no request waits or runs."""
        while self._requests:
            self._at_rest.clear()
            await self._at_rest.wait()

    async def close(self) -> None:
        """Fail what waits or runs with ``PoolClosed``, stop all workers at once, and return when all are reaped."""
        self._closing = True
        for request in list(self._requests.values()):
            self.leave(request.number, PoolClosed("the pool is closing"))
        self._staff.close()
        self.downloads.stop()
        self._preparation.stop()
        for entry in self._entries.values():
            entry.stop_timers()
            for replica in entry.replicas:
                self._clocks.stop(replica)
                self._clocks.forget_load(replica)
                self._stop_worker(replica)
        await self._staff.wait()
        await self._preparation.wait()
        await self.downloads.close()
        await self._transport.aclose()
        self.events.close()

    def kill_all(self) -> None:
        """Kill every worker now; :meth:`close` then ends soon."""
        self.downloads.kill_all()
        self._staff.kill_all()

    # --- what may be read ---

    def find(self, name: str) -> Entry | None:
        """Return the model of that name or alias."""
        return self._registry.names.get(name)

    def queued(self, entry: Entry) -> int:
        """Return how many requests wait for a model."""
        return self._scheduler.queued(entry.name) + len(entry.unsized)

    def status(self, entry: Entry) -> ModelStatus:
        """Return a model's public status."""
        known = self._entries.get(entry.name) is entry  # or it was removed while somebody waited for its end
        return status_of(entry, self._scheduler if known else None, self.waiting(entry) if known else ())

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

    def counts(self) -> PoolCounts:
        """Return what was counted since the pool was opened."""
        figures = msgspec.structs.asdict(self._staff.traffic)
        loaded = self._spares.ahead if self._spares.ready else None
        return PoolCounts(
            transport=self._transport.name,
            evictions=dict(self._scheduler.evictions),
            abandoned={name: msgspec.structs.replace(work) for name, work in self._abandoned.items()},
            ahead="" if loaded is None else loaded.model,
            **figures,
        )

    def statuses(self) -> list[ModelStatus]:
        """Return every model's public status, in the catalogue's order; removed ones that still run come last,
        and downloads after all."""
        downloads = {status.name: status for status in self.downloads.statuses()}
        models: list[ModelStatus] = []
        for entry in self._entries.values():
            # A model that is being downloaded at last is in the list already, and its own again once it is there.
            download = downloads.pop(entry.name, None)
            if download is None or download.state is State.DOWNLOADED:
                download = self.status(entry)
            models.append(download)
        return [*models, *downloads.values()]

    def _next_generation(self) -> int:
        return next(self._generations)

    def wanted_at_start(self) -> list[str]:
        """Return the names of the models that are to be loaded when the pool opens."""
        return [entry.name for entry in self._entries.values() if entry.spec.load_on_startup]

    # --- requests ---

    def look(self, request: Request, replica: Replica) -> None:
        """Send a command to one worker, past all that waits. Raises ModelNotLoaded if nobody is there to ask."""
        if replica.state is not State.LOADED or replica.worker is None or replica.drowsy or request.command is None:
            raise ModelNotLoaded(f"model {request.entry.name!r} is not loaded", code="model_not_loaded")
        # If its worker ends, the question ends with it.
        request.aside = request.retried = True
        self._requests[request.number] = request
        self._give(request, replica)
        if isinstance(request.command, SlotCommand):
            # What saves or restores a slot is in use: it is neither to idle away nor to make room meanwhile.
            self._scheduler.hold(request.entry.name, replica.index)
            self._clocks.stop(replica)
        replica.worker.post(request.command)

    def next_number(self) -> int:
        """Return a number for a new request."""
        return next(self._numbers)

    def accept(self, request: Request) -> None:
        """Take a request; its sink hears of it from now on, perhaps before this returns."""
        entry = request.entry
        refusal = self._refusal(entry)
        if refusal is not None:
            if request.sink is not None:
                request.sink.fail(refusal)
            return
        if request.command is not None and entry.worker is None:
            seconds = entry.backoff.wait(now())
            if seconds > 0 and request.sink is not None:
                request.sink.fail(explain_backoff(entry, seconds))
                return
        self._requests[request.number] = request
        self._let_wait(request)
        if entry.unsized and (full := self._scheduler.refusal(entry.name, *self._unsized(entry))) is not None:
            self.reject(request.number, full)
        else:
            self._admit(request)

    def _unsized(self, entry: Entry) -> tuple[int, int]:
        """Return how many requests wait for a model, and for all, that the scheduler does not know yet."""
        return len(entry.unsized), sum(len(other.unsized) for other in self._entries.values())

    def _admit(self, request: Request) -> None:
        if request.entry.sized:
            self._put(request)
        else:
            self._preparation.put(request.entry, request.number)

    def _refusal(self, entry: Entry) -> PoolError | None:
        """Return why nothing more can be asked of a model: a call of many commands may outlive what it began with."""
        if self._closing:
            return PoolClosed("the pool is closing")
        if entry.removed:
            return explain_removal(entry)
        return explain_broken(entry) if entry.broken else None

    def _let_wait(self, request: Request) -> None:
        request.since = now()
        if request.queue_timeout > 0:
            loop = asyncio.get_running_loop()
            request.patience = loop.call_later(request.queue_timeout, self._waited_too_long, request)

    def _waited_too_long(self, request: Request) -> None:
        waiting = self.waiting(request.entry)
        position = next((other.position for other in waiting if other.request == request.number), 0)
        self.leave(request.number, explain_wait(request, position, len(waiting)))

    def _put_all(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            request = self._requests.get(number)
            if request is not None:
                self._put(request)

    def _go_without(self, entry: Entry, failure: DownloadFailed) -> None:
        """Tell those who wait for a model that its files could not be downloaded."""
        error = explain_download(entry, failure)
        if failure.code != "cancelled":
            entry.replicas[0].error, entry.replicas[0].exit_code = error, None
            entry.backoff.failed(now())
        self.events.emit(entry.name, "status_change", {"status": entry.state, "exit_code": None})
        for number in list(entry.unsized):
            self.leave(number, error)
        self._revivals.await_backoff(entry)

    def _put(self, request: Request) -> None:
        name, holds = request.entry.name, request.command is not None
        prefix = prefix_keys(request.command) if request.entry.spec.replicas > 1 else ()
        self._scheduler.request(request.number, name, priority=request.priority, holds=holds, prefix=prefix)

    def _drop(self, number: int) -> Request:
        """Forget a request, however it ended."""
        request = self._requests.pop(number)
        request.stop_waiting()
        if request.replica is not None:
            del request.replica.requests[number]
        if not self._requests:
            self._at_rest.set()
            self._spares.at_rest()
        return request

    def leave(self, number: int, error: PoolError | None = None) -> None:
        """The caller of a request has left, or is told to with an error; what it held is freed. Unknown numbers are
        ignored.
        """
        request = self._requests.get(number)
        if request is None or request.sink is None:
            return
        entry, replica = request.entry, request.replica
        sink, request.sink = request.sink, None
        if error is not None:
            sink.fail(error)
        if replica is None:
            self._drop(number)
            if number in entry.unsized:
                entry.unsized.remove(number)
            self._scheduler.cancel(number)
            for idle in entry.replicas:
                if idle.rest is None:
                    self._clocks.mind(idle)
        elif replica.worker is not None and isinstance(request.command, _LONG):
            # The model stays busy until the worker confirms: what still computes must not be taken for idle.
            replica.worker.post(Cancel(request=number))

    # --- commands ---

    def unload(self, entry: Entry) -> None:
        """Begin to stop a model's workers, and turn away who waits for it. Raises ModelBusy if there is neither; no
        effect on workers that are stopping.
        """
        if (ahead := self._spares.ahead) is not None and ahead.model == entry.name:
            self._scheduler.give_up_ahead()
        self._scheduler.forget(entry.name)
        if entry.state not in RUNNING and not self.queued(entry):
            raise ModelBusy("model is not running", code="model_not_running")
        self._revivals.end(entry)
        error = WorkerFailed(f"model {entry.name!r} was unloaded", code="unloaded")
        if entry.preparing or entry.state not in RUNNING:
            self._turn_away(entry, error)
        if entry.fetching is not None:
            self.downloads.cancel(entry.fetching)
        for replica in entry.replicas:
            for number in list(replica.requests):
                self.leave(number, error)
        self._scheduler.unload(entry.name, error)

    def sleep(self, entry: Entry) -> None:
        """Have the idle workers of a model free it. Raises ModelBusy if it is not loaded or has requests."""
        loaded = [replica for replica in entry.replicas if replica.state is State.LOADED and not replica.drowsy]
        if not loaded or self.queued(entry) or self._scheduler.in_flight(entry.name):
            raise ModelBusy(f"model {entry.name!r} is {entry.state} and cannot sleep now", code="model_busy")
        for replica in loaded:
            self._put_to_sleep(replica)

    def _put_to_sleep(self, replica: Replica) -> None:
        if replica.worker is not None and self._scheduler.asleep(replica.entry.name, replica.index):
            replica.drowsy = True
            replica.worker.post(Sleep())
            if replica.entry.spec.may_be_gone and not replica.entry.awake:
                replica.entry.sized = False  # its files are looked for before one of them is woken

    def scale(self, entry: Entry, scales: tuple[float, ...]) -> None:
        """Have a model's LoRA adapters applied with these factors, one for each, now and after every load."""
        entry.scales = scales
        for replica in entry.replicas:
            if replica.worker is not None and replica.state is not State.STOPPING:
                replica.worker.post(Lora(scales=scales))
        self._recheck_ahead()

    @staticmethod
    def _give(request: Request, replica: Replica) -> None:
        request.replica = replica
        replica.requests[request.number] = request

    # --- effects: what the scheduler decided ---

    def start(self, model: str, replica: int) -> None:
        if not self._closing:
            self._start(self._entries[model].replicas[replica])

    def _start(self, replica: Replica) -> None:
        replica.spec = replica.entry.spec
        replica.state = transition(replica.state, Trigger.SPAWN)
        replica.progress = replica.failure = replica.error = replica.exit_code = None
        replica.drowsy = replica.waking = False
        replica.keep_alive = replica.load = None
        replica.oom_kills = oom_kills()
        self._staff.assign(replica)
        self._tell(replica, "model_status", {"status": State.LOADING})

    def settle(self, worker: Worker, replica: Replica) -> None:
        worker.post(load_of(replica.entry))
        self._clocks.watch_load(replica, worker)

    def stop(self, model: str, replica: int, heir: str | None = None) -> None:
        leaver = self._entries[model].replicas[replica]
        if heir is None or not self._staff.hand_over(leaver, self._entries[heir]):
            self._stop_worker(leaver)
            return
        self._clocks.stop(leaver)
        leaver.state = transition(leaver.state, Trigger.STOP)

    def wake(self, model: str, replica: int) -> None:
        sleeper = self._entries[model].replicas[replica]
        self._clocks.stop(sleeper)
        sleeper.drowsy, sleeper.waking = False, True
        if sleeper.worker is not None:
            sleeper.worker.post(Wake())
            self._clocks.watch_load(sleeper, sleeper.worker)

    def grant(self, ticket: int, replica: int) -> None:
        request = self._requests[ticket]
        request.stop_waiting()
        holder = request.entry.replicas[replica]
        if request.command is None:
            self._drop(ticket)
            self._clocks.mind(holder)
            if request.sink is not None:
                request.sink.finish(None)
        else:
            self._give(request, holder)
            self._clocks.stop(holder)
            if isinstance(request.sink, Stream):
                request.sink.start(now() - request.since)
            if holder.worker is not None:
                holder.worker.post(request.command)

    def reject(self, ticket: int, error: PoolError) -> None:
        request = self._drop(ticket)
        sink, request.sink = request.sink, None
        if sink is not None:
            sink.fail(error)

    def threads(self, model: str, replica: int, n: int) -> None:
        told = self._entries[model].replicas[replica]
        # A number that the user chose stays, and so does what belongs to cores of its own.
        chosen = told.spec.options.n_threads > 0 or told.spec.placement(replica).cores
        if told.worker is not None and not chosen:
            told.worker.post(Threads(n=n))

    def _stop_worker(self, replica: Replica) -> None:
        if replica.worker is None or replica.state is State.STOPPING:
            return
        self._clocks.stop(replica)
        self._staff.dismiss(replica)
        replica.state = transition(replica.state, Trigger.STOP)

    def keep_spare(self) -> None:
        """Start a spare worker, if the herd keeps one and has none. Called when the pool opens."""
        self._spares.keep()

    def drop_ahead(self) -> None:
        self._spares.drop()

    def _recheck_ahead(self) -> None:
        """Let go of what was loaded ahead if nobody would load it like that any more."""
        if self._spares.ahead is not None and self._outlook.is_outdated(self._spares.ahead):
            self._scheduler.give_up_ahead()

    def _tell(self, replica: Replica, event: str, data: dict[str, Any]) -> None:
        """Publish a change of a replica, as one of its model."""
        if replica.entry.spec.replicas > 1:
            data["replica"] = {"index": replica.index, "status": replica.state}
        self.events.emit(replica.entry.name, event, data)

    # --- news of workers ---

    def _feed(self, replica: Replica, deltas: Iterable[Delta]) -> None:
        find = self._requests.get
        for delta in deltas:
            request = find(delta.request)
            if request is not None and request.replica is replica and (sink := request.sink) is not None:
                request.answered = True
                sink.feed(delta)

    def _feed_progress(self, replica: Replica, news: Iterable[PromptProgress]) -> None:
        for progress in news:
            request = self._requests.get(progress.request)
            if request is not None and request.sink is not None and request.replica is replica:
                request.sink.feed(progress)

    def on_message(self, worker: Worker, message: ChildMessage) -> None:
        replica = self._homes.get(worker)
        if replica is None:
            self._spares.hear(worker, message)
            return
        if type(message) is Tokens:  # of all that is said, nearly all
            if message.progress:
                self._feed_progress(replica, message.progress)
            if message.deltas:
                self._feed(replica, message.deltas)
            if message.typed:
                self._feed(replica, message.typed)
        elif type(message) is Done:
            if replica.index and message.slot >= 0:
                first = replica.index * replica.spec.options.n_parallel
                message = msgspec.structs.replace(message, slot=first + message.slot)
            self._end(replica, message.request, message)
        else:
            self._on_other(worker, replica, message)

    def _on_other(self, worker: Worker, replica: Replica, message: ChildMessage) -> None:
        match message:
            case Vectors():
                for vector in message.vectors:
                    request = self._requests.get(vector.request)
                    if request is not None and request.sink is not None and request.replica is replica:
                        request.sink.feed(vector)
            case Result():
                self._end(replica, message.request, message)
            case Failed(request=None):
                replica.failure = message
            case Failed():
                self._end(replica, message.request, explain_failure(message))
            case StateMessage(state="unloaded"):
                self._staff.on_unloaded(worker, replica)
            case StateMessage():
                self._on_state(replica, message)
            case Stats():
                replica.load = message.load or replica.load
                if replica.spec.memory is None and message.rss_bytes > 0:
                    gpus = self._measured_gpus(worker) if message.gpu else (0,) * len(self._gpus)
                    self._scheduler.measure(replica.entry.name, message.rss_bytes, replica.index, gpus)
            case Unknown():
                self._on_unknown(worker, replica, message)
            case Tokens() | Done():
                pass  # see above

    def _on_unknown(self, worker: Worker, replica: Replica, message: Unknown) -> None:
        """Nobody waits for what nobody knows; but an answer that cannot be read is one that will never come."""
        _log.warning("%r sent a %r that means nothing here: %s", worker, message.kind, message.reason)
        if message.kind not in _ANSWERS:
            return
        reason = f"the worker's answer, a {message.kind!r}, cannot be read: {message.reason}"
        if message.request is not None:
            self._end(replica, message.request, WorkerFailed(reason, code="protocol"))
        else:  # anybody's answer may be in it
            worker.fail(reason)

    def _measured_gpus(self, worker: Worker) -> tuple[int, ...] | None:
        if not self._gpus or self._gpu_memory is None or worker.pid is None:
            return None
        used = self._gpu_memory.used_by(worker.pid)
        return None if used is None else tuple(used[gpu.index] for gpu in self._gpus)

    def _end(self, replica: Replica, number: int | None, end: Done | Result | PoolError) -> None:
        request = self._requests.get(number) if number is not None else None
        if request is None or request.replica is not replica:
            return  # it has ended, or is none of this worker's business
        self._drop(request.number)
        if request.sink is not None:
            if isinstance(end, PoolError):
                request.sink.fail(end)
            else:
                request.sink.finish(end)
        elif isinstance(end, Done):
            self._abandoned.setdefault(replica.entry.name, Abandoned()).add(end)
        if request.aside:
            if isinstance(request.command, SlotCommand):
                self._scheduler.let_go(replica.entry.name, replica.index)
                self._clocks.mind(replica)
            return
        replica.keep_alive = request.keep_alive
        self._scheduler.finish(request.number)
        self._clocks.mind(replica)

    def _on_state(self, replica: Replica, message: StateMessage) -> None:
        trigger = _TRIGGERS.get(message.state)
        try:
            if trigger is None:
                raise IllegalTransition(f"unknown state {message.state!r}")
            replica.state = transition(replica.state, trigger)
        except IllegalTransition as reason:
            _log.debug("ignored a state message of %r: %s", replica.worker, reason)
            return
        entry = replica.entry
        replica.heard = now()
        data: dict[str, Any] = {"status": entry.state}
        if trigger is Trigger.PROGRESS:
            replica.progress = data["progress"] = message.payload
        elif trigger is Trigger.READY:
            replica.progress = replica.failure = None
            replica.waking = replica.let_down = False
            self._revivals.end(entry)
            self._clocks.forget_load(replica)
            entry.backoff.succeeded()
            if message.payload:
                entry.info = data["info"] = {"created": int(time.time()), **message.payload}
        self._tell(replica, "status_change", data)
        if trigger is Trigger.READY:
            self._scheduler.ready(entry.name, replica.index)
            self._spares.replace()
        self._clocks.mind(replica)

    def on_exit(self, worker: Worker, end: Exit) -> None:
        self._staff.on_exit(worker, end)

    def vacate(self, replica: Replica, worker: Worker, end: Exit, *, told: bool) -> None:
        entry = replica.entry
        # A spare that was dead or dying when it was taken says nothing about the model.
        untried = replica.loading and replica.progress is None and replica.failure is None
        stillborn = replica.adopted and untried and not told
        error = None if told or stillborn else explain_exit(replica, worker, end)
        starved = error is not None and ran_out_of_memory(replica, worker, end)
        replica.log.end_line()
        loading, replica.waking = replica.loading, False
        self._clocks.forget_load(replica)
        replica.state = transition(replica.state, Trigger.EXIT)
        replica.load = None
        replica.worker, replica.progress, replica.exit_code, replica.error = None, None, end.code, error
        if replica.vacated is not None:
            replica.vacated.set()
            replica.vacated = None
        self._clocks.mind(replica)
        retry = not loading and error is not None and not entry.broken and not entry.removed
        again = self._lose_granted(replica, error, retry=retry)
        self._tell(replica, "status_change", {"status": entry.state, "exit_code": end.code})
        for request in again.values():
            self._let_wait(request)
        if entry.worker is None and entry.spec.may_be_gone and not again and not self._scheduler.queued(entry.name):
            entry.sized = False  # its files are looked for before the next start
        # What is no longer what it was has to be prepared before anyone can start it.
        at_once = again if entry.sized else {}
        second_try = self._scheduler.exited(
            entry.name, error if loading else None, replica=replica.index, short_of_memory=starved, again=at_once
        )
        if error is not None and not second_try:
            self._revivals.count(entry, error, loading=loading, starved=starved)
        for request in again.values() if not at_once else ():
            self._preparation.put(entry, request.number)
        self._registry.forget_if_gone(entry)

    def _revive(self, entry: Entry) -> None:
        """Bring a pinned model back whose worker died."""
        if not (entry.lives or entry.broken or entry.removed or self._closing):
            self.accept(Request(self.next_number(), entry, None, Nobody(), priority=entry.spec.priority))

    def _let_grow(self, entry: Entry) -> None:
        if self._entries.get(entry.name) is entry:
            self._scheduler.let_grow(entry.name)

    def _lose_granted(self, replica: Replica, error: PoolError | None, *, retry: bool) -> dict[int, Request]:
        """Fail the requests that a worker took with it. Return those that deserve a second worker: nothing of their
        answer is out, and this was their first.
        """
        again: dict[int, Request] = {}
        for request in list(replica.requests.values()):
            if request.sink is not None and retry and not request.answered and not request.retried:
                del replica.requests[request.number]
                request.replica, request.retried = None, True
                again[request.number] = request
                continue
            self._drop(request.number)
            if request.sink is not None:
                gone = error or WorkerFailed(f"model {replica.entry.name!r} was stopped", code="unloaded")
                request.sink.fail(gone)
        return again

    # --- rest ---

    def _is_idle(self, replica: Replica) -> bool:
        return self._scheduler.unused(replica.entry.name, replica.index)

    def _on_rest(self, replica: Replica, rest: Rest) -> None:
        if rest.action == "sleep":
            self._put_to_sleep(replica)
        elif not replica.entry.spec.pinned or replica.is_spare:
            self._scheduler.dismiss(replica.entry.name, replica.index)
