"""Downloads: workers in download mode, each of which fetches one model into the cache.

They take no place and no memory of the models', and the scheduler does not know of them. This module owns their state
as the herd owns that of models; both tell their news to the same event log. A download is known by its name until it
has failed; one that has finished stays in the list, as ``downloaded``, until the catalogue takes it over. The files of
a model that is in the catalogue already are *fetched*: that download is its model's affair and in no list.
"""

import asyncio
import os
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Final, cast

from llamaherd.pool.errors import DownloadFailed, ModelBusy, PoolClosed, QueueFull
from llamaherd.pool.events import EventLog
from llamaherd.pool.launch import HUB_LOGIN_ENV, Exit, Launcher
from llamaherd.pool.lifecycle import State
from llamaherd.pool.logs import LogRing
from llamaherd.pool.status import ModelStatus
from llamaherd.pool.worker import Worker, wait_all
from llamaherd.transport import Transport
from llamaherd.transport.messages import ChildMessage, Download
from llamaherd.transport.messages import State as StateMessage

__all__ = ["MAX_DOWNLOADS", "Downloads", "Job"]

#: Most downloads at a time.
MAX_DOWNLOADS: Final = 4
#: Seconds that a download has to end by itself once it is told to: it writes nothing that a kill could spoil.
STOP_SECONDS: Final = 1.0


@dataclass(slots=True)
class Job:
    """One download.

    Attributes:
        worker: None once it is over, and while it waits for others to end.
        begun: Resolves when the hub has said what there is to fetch.
        ended: Resolves when the download is over, with its failure or None.
        progress: Bytes of each file: ``{url: {"done", "total"}}``.
        failure: Why it came to nothing.
        cancelled: Whether somebody told it to stop.
    """

    name: str
    begun: asyncio.Future[None]
    ended: asyncio.Future[DownloadFailed | None]
    worker: Worker | None = None
    state: State = State.DOWNLOADING
    log: LogRing = field(default_factory=LogRing)
    progress: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])
    failure: DownloadFailed | None = None
    cancelled: bool = False


class Downloads:
    """See the module's text. Implements :class:`~llamaherd.pool.worker.Owner`.

    Args:
        next_generation: Gives each worker the number that is unique in the pool.
    """

    def __init__(
        self, transport: Transport, launcher: Launcher, events: EventLog, next_generation: Callable[[], int]
    ) -> None:
        self._transport = transport
        self._launcher = launcher
        self._events = events
        self._next_generation = next_generation
        self._jobs: dict[str, Job] = {}
        self._workers: dict[Worker, Job] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        #: What is fetched when one of those that go on has ended.
        self._waiting: deque[tuple[Job, Download, str]] = deque()
        self._closing = False

    def find(self, name: str) -> Job | None:
        """Return the download of that name: one that goes on, or has finished."""
        return self._jobs.get(name)

    def active(self, name: str) -> Job | None:
        """Return the download of that name if it goes on."""
        job = self._jobs.get(name)
        return job if job is not None and job.worker is not None else None

    def statuses(self) -> list[ModelStatus]:
        """Return every download as a model's status, in the order in which they began."""
        return [self.status(job) for job in self._jobs.values()]

    def status(self, job: Job) -> ModelStatus:
        """Return a download as a model's status."""
        worker = job.worker
        return ModelStatus(
            name=job.name,
            state=job.state,
            source="cache",
            args=() if worker is None else tuple(worker.args),
            progress=dict(job.progress) or None,
            pid=None if worker is None else worker.pid,
        )

    def start(self, name: str, command: Download, token: str | None) -> Job:
        """Begin a download.

        Raises:
            ModelBusy: one of that name goes on. QueueFull: there are too many. PoolClosed.
        """
        self._check_open()
        if self.active(name) is not None:
            raise ModelBusy(f"{name} is being downloaded already", code="download_running")
        if len(self._workers) >= MAX_DOWNLOADS:
            raise QueueFull(f"{MAX_DOWNLOADS} downloads go on already", code="too_many_downloads", retry=True)
        job = self._new_job(name)
        self._jobs.pop(name, None)
        self._jobs[name] = job
        self._run(job, command, token or "")
        self._events.emit(name, "model_status", {"status": State.DOWNLOADING})
        return job

    def fetch(self, name: str, command: Download, token: str) -> Job:
        """Begin to download the files of a model; where too many downloads go on, when one of them has ended.

        Raises:
            PoolClosed.
        """
        self._check_open()
        job = self._new_job(name)
        if len(self._workers) >= MAX_DOWNLOADS:
            self._waiting.append((job, command, token))
        else:
            self._run(job, command, token)
        self._events.emit(name, "model_status", {"status": State.DOWNLOADING})
        return job

    def _check_open(self) -> None:
        if self._closing:
            raise PoolClosed("the pool is closing")

    def _new_job(self, name: str) -> Job:
        loop = asyncio.get_running_loop()
        return Job(name=name, begun=loop.create_future(), ended=loop.create_future())

    def _run(self, job: Job, command: Download, token: str) -> None:
        worker = job.worker = Worker(job.name, self._next_generation(), self)
        self._workers[worker] = job
        worker.post(command)
        secret = "" if command.registry or command.url else token or os.environ.get(HUB_LOGIN_ENV)
        self._keep(self._launch(job, worker, {HUB_LOGIN_ENV: secret} if secret else {}))

    def cancel(self, job: Job) -> None:
        """Stop a download. What it has fetched stays for a repeat. No effect on one that is over."""
        if job.worker is not None:
            job.cancelled = True
            job.worker.stop(STOP_SECONDS)
        elif not job.ended.done() and any(other is job for other, *_ in self._waiting):
            self._waiting = deque(waiting for waiting in self._waiting if waiting[0] is not job)
            job.cancelled = True
            self._fail(job, "")

    def forget_finished(self) -> None:
        """Take the finished downloads off the list: a new catalogue has them as models."""
        self._jobs = {name: job for name, job in self._jobs.items() if job.worker is not None}

    def stop(self) -> None:
        """Begin none from now on, and cancel what goes on or waits."""
        self._closing = True
        for job in [*self._workers.values(), *(waiting[0] for waiting in self._waiting)]:
            self.cancel(job)

    async def close(self) -> None:
        """Cancel what goes on, and return when all workers are reaped."""
        self.stop()
        await wait_all(self._workers, self._tasks)

    def kill_all(self) -> None:
        """Kill every worker now."""
        for worker in self._workers:
            worker.kill()

    def _keep(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _launch(self, job: Job, worker: Worker, env: dict[str, str]) -> None:
        try:
            await worker.launch(self._launcher, self._transport, job.log.feed, env)
        except Exception as error:  # a launcher may be anyone's, and whatever it raises must reach those who wait
            detail = f"it could not be started: {error}"
            self.on_exit(worker, Exit(reason="exited", code=None, signal=None, node="", detail=detail))

    # --- news of workers ---

    def on_message(self, worker: Worker, message: ChildMessage) -> None:
        job = self._workers.get(worker)
        if job is None or not isinstance(message, StateMessage) or message.state != "downloading":
            return
        payload = message.payload or {}
        match payload.get("result"):
            case "download_finished":
                job.state = State.DOWNLOADED
                worker.stop(STOP_SECONDS)
            case "download_failed":
                job.failure = _failure(payload)
                worker.stop(STOP_SECONDS)
            case _:
                self._on_progress(job, payload)

    def _on_progress(self, job: Job, payload: dict[str, Any]) -> None:
        plan = payload.get("plan")
        if isinstance(plan, dict):
            sizes = cast("dict[str, int]", plan)
            job.progress = {address: {"done": 0, "total": int(total)} for address, total in sizes.items()}
            _resolve(job.begun)
        elif isinstance(url := payload.get("url"), str):
            job.progress[url] = {"done": int(payload.get("downloaded", 0)), "total": int(payload.get("total", 0))}
            # llama-server's page has the files at the top, llama-server itself has them under "progress".
            self._events.emit(job.name, "download_progress", {**job.progress, "progress": dict(job.progress)})

    def on_exit(self, worker: Worker, end: Exit) -> None:
        job = self._workers.pop(worker)
        job.worker = None
        job.log.end_line()
        if job.state is State.DOWNLOADED:
            self._events.emit(job.name, "download_finished", {})
            _resolve(job.begun)
            _resolve(job.ended)
        else:
            self._fail(job, worker.kill_reason or end.detail)
        if self._waiting and not self._closing:
            self._run(*self._waiting.popleft())

    def _fail(self, job: Job, detail: str) -> None:
        # A download that failed is no model, and leaves the list.
        if self._jobs.get(job.name) is job:
            del self._jobs[job.name]
        failure = job.failure
        if job.cancelled:
            failure = DownloadFailed(f"the download of {job.name} was cancelled", code="cancelled", retry=True)
        if failure is None:
            lines = [line for line in job.log.tail(3) if line.strip()]
            shown = f"; last log lines: {' | '.join(lines)}" if lines else ""
            failure = DownloadFailed(
                f"the download of {job.name} broke off: {detail}{shown}", code="worker_died", retry=True
            )
        job.failure = failure
        data: dict[str, Any] = {"reason": str(failure), "code": failure.code, "retry": failure.retry}
        if failure.retry_after is not None:
            data["retry_after"] = failure.retry_after
        self._events.emit(job.name, "download_failed", data)
        _resolve(job.begun)
        _resolve(job.ended, failure)


def _resolve(future: asyncio.Future[Any], result: object = None) -> None:
    if not future.done():
        future.set_result(result)


def _failure(payload: dict[str, Any]) -> DownloadFailed:
    retry_after = payload.get("retry_after")
    return DownloadFailed(
        str(payload.get("reason", "the download failed")),
        code=str(payload.get("code", "download_failed")),
        retry=payload.get("retry") is True,
        retry_after=float(retry_after) if isinstance(retry_after, int | float) else None,
    )
