"""The wording of ends: from what is known of a worker or a request to the error that its callers get."""

import signal
from typing import Final

from llamaherd.pool.entry import Entry, Replica, Request
from llamaherd.pool.errors import (
    RETRY_AFTER,
    BadRequest,
    DownloadFailed,
    LoadFailed,
    ModelNotFound,
    PoolError,
    QueueTimeout,
    WorkerDied,
    WorkerFailed,
)
from llamaherd.pool.last_words import explain_signal, tells_of_a_full_gpu
from llamaherd.pool.launch import Exit
from llamaherd.pool.machine import oom_kills
from llamaherd.pool.worker import Worker
from llamaherd.transport.messages import Failed

__all__ = [
    "explain_backoff",
    "explain_broken",
    "explain_download",
    "explain_exit",
    "explain_failure",
    "explain_removal",
    "explain_wait",
    "ran_out_of_memory",
]

#: Log lines shown in an error for which the worker gave no reason, and kept in its ``log``.
SHOWN_LOG_LINES: Final = 3
KEPT_LOG_LINES: Final = 20
#: The worker's code for a load that found too little memory.
OUT_OF_MEMORY: Final = "out_of_memory"


def explain_failure(failure: Failed) -> PoolError:
    """Return the error that a worker's ``failed`` for one request means."""
    if failure.fault == "caller":
        return BadRequest(failure.message, code=failure.code, details=failure.details)
    return WorkerFailed(failure.message, code=failure.code, retry=failure.retry)


def explain_broken(entry: Entry) -> LoadFailed:
    """Return the error for a request for a model that the catalogue has, but cannot use."""
    return LoadFailed(f"model {entry.name!r} cannot be used: {entry.broken}", code="model_broken")


def explain_download(entry: Entry, failure: DownloadFailed) -> LoadFailed:
    """Return the error for those who wait for a model whose files could not be downloaded."""
    return LoadFailed(
        f"model {entry.name!r} could not be loaded: its download failed: {failure}",
        code=failure.code,
        retry=failure.retry,
        retry_after=failure.retry_after,
    )


def explain_removal(entry: Entry) -> ModelNotFound:
    """Return the error for those who wait for a model that the catalogue has no more."""
    return ModelNotFound(f"model {entry.name!r} was removed", code="model_not_found")


def explain_backoff(entry: Entry, seconds: float) -> LoadFailed:
    """Return the error for a request that comes too soon after failed loads."""
    last = entry.last_end
    return LoadFailed(
        f"model {entry.name!r} is not tried again for {seconds:.1f} s, after: {None if last is None else last.error}",
        code="load_backoff",
        retry=True,
        retry_after=seconds,
        exit_code=None if last is None else last.exit_code,
    )


def explain_wait(request: Request, position: int, waiting: int) -> QueueTimeout:
    """Return the error for a request that has waited too long."""
    entry = request.entry
    return QueueTimeout(
        f"the request waited {request.queue_timeout:g} s (queue_timeout) for model {entry.name!r}, which is "
        f"{entry.state}, and is number {position} of {waiting} that wait for it",
        code="queue_timeout",
        retry=True,
        retry_after=RETRY_AFTER,
    )


def ran_out_of_memory(replica: Replica, worker: Worker, end: Exit) -> bool:
    """Whether a worker ended for want of memory, by its own word, by its GPU's or by the kernel's."""
    if replica.failure is not None:
        return replica.failure.code == OUT_OF_MEMORY
    if end.signal == signal.SIGABRT:
        return tells_of_a_full_gpu(replica.log.tail(KEPT_LOG_LINES))
    killed = end.signal == signal.SIGKILL and not worker.kill_reason
    return killed and oom_kills() > replica.oom_kills


def explain_exit(replica: Replica, worker: Worker, end: Exit) -> LoadFailed | WorkerDied:
    """Return the error for those who counted on a worker that ended without being told to."""
    log = replica.log.tail(KEPT_LOG_LINES)
    failure = replica.failure
    name = replica.entry.name
    out_of_memory = ran_out_of_memory(replica, worker, end)
    words = explain_signal(end.signal, log) if end.signal is not None else ""
    if failure is not None:
        reason = f"{failure.message} ({end.detail})"
    elif worker.kill_reason:
        reason = f"its worker was killed because {worker.kill_reason}"
    elif out_of_memory and words:
        remedy = "set a smaller n_ctx or n_ubatch, fewer n_gpu_layers, or load fewer models at a time"
        reason = f"its worker ran out of GPU memory ({words}); {remedy}"
    elif out_of_memory:
        reason = "the kernel killed its worker for want of memory; set a smaller context or fewer models at a time"
    elif words:
        reason = f"its worker ended: {end.detail}: {words}"
    else:
        lines = [line.strip() for line in log if line.strip()][-SHOWN_LOG_LINES:]
        reason = f"its worker ended: {end.detail}" + ("; last log lines: " + " | ".join(lines) if lines else "")
    code = OUT_OF_MEMORY if out_of_memory else failure.code if failure is not None else ""
    if replica.loading:
        return LoadFailed(
            f"model {name!r} could not be loaded: {reason}",
            code=code or "load_failed",
            # What a file has once made llama.cpp assert, it will again.
            retry=out_of_memory or (failure.retry if failure is not None else not words),
            exit_code=end.code,
            log=log,
        )
    return WorkerDied(
        f"model {name!r} failed: {reason}", code=code or "worker_died", retry=True, exit_code=end.code, log=log
    )
