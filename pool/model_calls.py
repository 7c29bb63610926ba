"""The calls of a pool about its models: what there is, how it fares, and what of it is loaded."""

import asyncio
import logging
from collections.abc import Iterable, Sequence

from msgspec.structs import replace

from llamaherd.pool.calls import Calls
from llamaherd.pool.config import BrokenModel, ModelSpec
from llamaherd.pool.counts import PoolCounts
from llamaherd.pool.downloads import Job
from llamaherd.pool.entry import Answer, Request
from llamaherd.pool.errors import ModelBusy
from llamaherd.pool.events import Subscription
from llamaherd.pool.lifecycle import State
from llamaherd.pool.reload import ReloadReport
from llamaherd.pool.status import ModelStatus
from llamaherd.transport.messages import Result

__all__ = ["ModelCalls"]

_log = logging.getLogger("llamaherd.pool")


class ModelCalls(Calls):
    """The catalogue, the status of its models, and commands to load them, to unload them and to let them sleep."""

    def reload(self, models: Iterable[ModelSpec | BrokenModel]) -> ReloadReport:
        """Take a new catalogue in the place of the old one, and return what that changed.

        Nothing is dropped. Models that are the same go on untouched, also where only settings of the pool's side
        differ (times, priority, aliases and so on), which count from now on. A worker that would be started otherwise
        now, or whose model is gone, takes no new requests, finishes those that it has, and leaves; requests for a
        changed model wait for that and start it anew. Who waits for a model that is gone gets ``ModelNotFound``.
        Nothing is loaded, not even what is marked for the start. An entry that cannot be used (a
        :class:`~llamaherd.pool.config.BrokenModel`, or a spec that is wrong) is listed as failed, with its reason.

        Raises:
            BadRequest: something is no model; nothing has changed. PoolClosed.
        """
        self._check_open()
        report = self._herd.reload(models)
        self._herd.downloads.forget_finished()
        return report

    def models(self) -> list[ModelStatus]:
        """Return the status of every model, in the catalogue's order; removed ones that still finish their requests
        come last. Reading wakes and changes nothing.
        """
        return self._herd.statuses()

    def counts(self) -> PoolCounts:
        """Return what the pool has counted since it was opened: messages, bytes, models that made room."""
        return self._herd.counts()

    def status(self, model: str) -> ModelStatus:
        """Return one model's status, by name or alias. Raises ModelNotFound."""
        job = self._herd.downloads.find(model)
        if job is not None and (job.state is not State.DOWNLOADED or self._herd.find(model) is None):
            return self._herd.downloads.status(job)
        return self._herd.status(self._entry(model))

    def logs(self, model: str) -> tuple[str, ...]:
        """Return the last lines that the model's workers printed, oldest first: at most 1,000 of each replica, which
        follow one another where there are several, with ``#1`` and so on before each line. Raises ModelNotFound.
        """
        job = self._job(model)
        return job.log.tail() if job is not None else self._entry(model).logs()

    def logs_since(self, model: str, marks: Sequence[int] = ()) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Return the lines that a model's workers finished since the last call, and the marks for the next.

        Args:
            marks: What the last call returned beside its lines; empty for all that is kept.

        Raises:
            ModelNotFound: there is no such model.
        """
        job = self._job(model)
        if job is not None:
            return job.log.since(marks[0] if marks else 0), (job.log.count,)
        return self._entry(model).logs_since(marks)

    def _job(self, model: str) -> Job | None:
        """Return the download that goes on under a name, or for the model of that name."""
        job = self._herd.downloads.active(model)
        entry = self._herd.find(model)
        return job if job is not None or entry is None else entry.download

    def events(self, since: int | None = None) -> Subscription:
        """Return a stream of events: a snapshot first, then every change in order; see
        :class:`~llamaherd.pool.events.Event`.

        Args:
            since: The ``seq`` of the last event that the caller knows. The stream begins with what came after it,
                without a snapshot, as long as that is kept: the last 1,024 events.
        """
        return self._herd.events.subscribe(since)

    async def load(self, model: str) -> ModelStatus:
        """Load a model, if it is not loaded, and return its status once it is ready. Files that are not there are
        downloaded first, if its spec says from where.

        Waits for room if ``models_max`` models are running and busy; a cancelled wait gives the place up.

        Raises:
            LoadFailed: with the reason. ModelNotFound, PoolClosed.
        """
        entry = self._entry_for(model)
        await self._ask(entry, self._herd.next_number(), None)
        return self._herd.status(entry)

    def start_load(self, model: str) -> None:
        """Begin to load a model and return at once; events tell what comes of it.

        Raises:
            ModelBusy: it is running, or being loaded, already. ModelNotFound, PoolClosed.
        """
        entry = self._entry_for(model)
        if entry.state is not State.UNLOADED or self._herd.queued(entry):
            raise ModelBusy("model is already running", code="model_running")
        future: asyncio.Future[Result | None] = asyncio.get_running_loop().create_future()
        future.add_done_callback(_note_failure)
        self._herd.accept(Request(self._herd.next_number(), entry, None, Answer(future), priority=entry.spec.priority))

    async def unload(self, model: str) -> ModelStatus:
        """Stop a model's worker and return its status once the process is gone. A download is cancelled.

        What the worker runs, and what waits for the model, fails with ``WorkerFailed`` (code ``unloaded``).

        Raises:
            ModelBusy: it is not running, and nothing waits for it. ModelNotFound.
        """
        job = self._herd.downloads.active(model)
        if job is not None:
            status = self._herd.downloads.status(job)
            self._herd.downloads.cancel(job)
            await asyncio.shield(job.ended)
            return replace(status, state=State.UNLOADED, progress=None, pid=None)
        entry = self._entry(model)
        # All at once: one that is gone may be started anew while the others are waited for.
        ends, fetching = [one.vacancy() for one in entry.replicas], entry.download
        if entry.state is not State.STOPPING:
            self.start_unload(model)
        for end in ends:
            await end.wait()
        if fetching is not None:
            await asyncio.shield(fetching.ended)
        return self._herd.status(entry)

    def start_unload(self, model: str) -> None:
        """Begin to stop a model's worker and return at once. Otherwise as :meth:`unload`; no effect on one that is
        stopping.
        """
        job = self._herd.downloads.active(model)
        if job is not None:
            self._herd.downloads.cancel(job)
        else:
            self._herd.unload(self._entry(model))

    def start_sleep(self, model: str) -> None:
        """Have a worker free its model but keep its process; the next request wakes it.

        Raises:
            ModelBusy: the model is not loaded, or has requests. ModelNotFound.
        """
        self._herd.sleep(self._entry(model))


def _note_failure(future: asyncio.Future[Result | None]) -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        _log.info("%s", error)
