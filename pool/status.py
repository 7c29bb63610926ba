"""What the pool reports of a model to anyone who asks; reading it changes nothing."""

from typing import Any

import msgspec

from llamaherd.pool.lifecycle import State
from llamaherd.transport.messages import EngineLoad

__all__ = ["ModelStatus", "QueuedRequest", "ReplicaStatus"]


class QueuedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request that waits for its model.

    Attributes:
        request: Its number, as ``Generation.request`` has it.
        position: Its place among those that wait for the same model, 1 is next. One of higher priority that comes
            later moves it back.
        priority: Higher goes first.
        seconds: How long it has waited.
    """

    request: int
    position: int
    priority: int
    seconds: float


class ReplicaStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One worker of a model, or the place for one.

    Attributes:
        index: Its number, from 0 on.
        pid: Its process; None while it has none.
        in_flight: Requests granted to it and not ended.
        memory: Bytes that it takes; 0 without a process, and where nothing is known.
        exit_code: How its last worker ended, negative for a signal; None if none has.
        error: Why its last load or worker failed, for people.
        load: How busy its worker is and what it has done, as it told within the last second; None before that.
    """

    index: int
    state: State
    pid: int | None = None
    in_flight: int = 0
    memory: int = 0
    exit_code: int | None = None
    error: str | None = None
    load: EngineLoad | None = None


class ModelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One model at one moment. With several replicas its state is that of the one which is furthest on; ``args``,
    ``progress`` and ``pid`` are those of the first one that runs.

    Attributes:
        path: The GGUF file, None for the fake engine.
        source: Where the model comes from: ``preset``, ``models_dir`` or ``cache``.
        preset: The settings that made it, as a section of a preset file; empty where none did.
        args: The worker's command line, without secrets; empty while it has no process.
        progress: While loading: ``stages``, ``current`` and ``value`` (0 to 1), as the worker reported them.
        modalities: What it takes in: ``text``, and with a projector ``image`` and ``audio``.
        info: The model's facts from its last ``ready``: ``id``, ``meta`` and so on; None before the first.
        failed: Whether the last worker ended with an error.
        exit_code: How the last worker ended, negative for a signal; None if none has.
        error: Why the last load or worker failed, for people.
        pid: The worker's process.
        in_flight: Requests granted and not ended.
        queued: Requests waiting for the model.
        waiting: These requests, in the order in which they will be served.
        memory: Bytes that all its workers take: measured once it was loaded, estimated before; 0 where nothing is known
            yet.
        slots: Requests that one worker of it runs at a time.
        replicas: Its workers and the places for them.
    """

    name: str
    state: State
    aliases: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    path: str | None = None
    source: str = "preset"
    preset: str = ""
    args: tuple[str, ...] = ()
    progress: dict[str, Any] | None = None
    modalities: tuple[str, ...] = ("text",)
    info: dict[str, Any] | None = None
    failed: bool = False
    exit_code: int | None = None
    error: str | None = None
    pid: int | None = None
    in_flight: int = 0
    queued: int = 0
    waiting: tuple[QueuedRequest, ...] = ()
    memory: int = 0
    slots: int = 1
    replicas: tuple[ReplicaStatus, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the status as plain JSON data."""
        fields = {field: getattr(self, field) for field in self.__struct_fields__}
        return fields | {name: msgspec.to_builtins(fields[name]) for name in ("waiting", "replicas")}
