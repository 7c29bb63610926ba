"""From the pool's records to what it reports of them."""

from llamaherd.pool.entry import Entry, Replica
from llamaherd.pool.explain import explain_broken
from llamaherd.pool.gguf import modalities_of
from llamaherd.pool.schedule import Scheduler
from llamaherd.pool.status import ModelStatus, QueuedRequest, ReplicaStatus

__all__ = ["status_of"]


def status_of(entry: Entry, scheduler: Scheduler | None, waiting: tuple[QueuedRequest, ...]) -> ModelStatus:
    """Return a model's public status; ``scheduler`` is None for one that is gone."""
    spec, worker, last = entry.spec, entry.worker, entry.last_end
    first = next((one for one in entry.replicas if one.worker is worker), entry.replicas[0])
    job = entry.download
    fetcher = None if job is None else job.worker
    error = str(explain_broken(entry)) if entry.broken else None if last is None else str(last.error)
    return ModelStatus(
        name=entry.name,
        state=entry.state,
        aliases=spec.aliases,
        tags=spec.tags,
        path=None if spec.path is None else str(spec.path),
        source=spec.source,
        preset=spec.preset,
        args=tuple(one.args) if (one := worker or fetcher) is not None else (),
        progress=first.progress if job is None else dict(job.progress) or None,
        modalities=modalities_of(spec.mmproj),
        info=entry.info,
        failed=error is not None,
        exit_code=first.exit_code if last is None else last.exit_code,
        error=error,
        pid=one.pid if one is not None else None,
        in_flight=0 if scheduler is None else scheduler.in_flight(entry.name),
        queued=len(waiting),
        waiting=waiting,
        memory=0 if scheduler is None else scheduler.memory(entry.name),
        slots=spec.options.n_parallel,
        replicas=() if scheduler is None else tuple(_replica(one, scheduler) for one in _shown(entry)),
    )


def _shown(entry: Entry) -> list[Replica]:
    return [one for one in entry.replicas if one.index < entry.spec.replicas or one.worker is not None]


def _replica(replica: Replica, scheduler: Scheduler) -> ReplicaStatus:
    name, worker = replica.entry.name, replica.worker
    return ReplicaStatus(
        index=replica.index,
        state=replica.state,
        pid=None if worker is None else worker.pid,
        in_flight=scheduler.in_flight(name, replica.index),
        memory=0 if worker is None else scheduler.memory(name, replica.index),
        exit_code=replica.exit_code,
        error=None if replica.error is None else str(replica.error),
        load=replica.load,
    )
