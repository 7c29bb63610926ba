"""What a model is, to the pool: its name, its file and how to load it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from llamaherd.pool.errors import BadRequest
from llamaherd.pool.origin import Origin
from llamaherd.transport.messages import MAX_MESSAGE_BYTES, Adapter, EngineOptions, Load, Unknown, decode, encode

__all__ = [
    "DEFAULT_DRAIN_TIMEOUT",
    "DEFAULT_STOP_TIMEOUT",
    "MAX_NAME_LENGTH",
    "MOST_SCALE",
    "Adapter",
    "EngineOptions",
    "ModelSpec",
    "Source",
    "CORES_ENV",
    "CUDA_ENV",
    "BrokenModel",
    "Placement",
    "check_name",
]

#: Seconds between the exit command and the kill; the reference's default.
DEFAULT_STOP_TIMEOUT: Final = 10.0
#: Seconds that requests have to come to their end when a pool drains.
DEFAULT_DRAIN_TIMEOUT: Final = 30.0
#: Seconds without a sign of life after which a load is given up.
DEFAULT_LOAD_STALL: Final = 300.0
MAX_NAME_LENGTH: Final = 256
#: Of a LoRA adapter, either way; larger factors make nothing but infinite numbers.
MOST_SCALE: Final = 1000.0

#: Where a model comes from, in the reference's words.
Source = Literal["preset", "models_dir", "cache"]
MAX_REPLICAS: Final = 64
#: Environment variable that tells a worker which cores to run on; read by ``pool/child``.
CORES_ENV: Final = "LLAMAHERD_CORES"
#: Read by CUDA before a worker's first use of a GPU.
CUDA_ENV: Final = "CUDA_VISIBLE_DEVICES"
#: Has CUDA number GPUs as nvidia-smi does, instead of the fastest first.
_CUDA_ORDER: Final = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


#: Options that a worker would understand, by their identity, which they keep as long as they are in here.
_UNDERSTOOD: Final[dict[int, EngineOptions]] = {}
_MOST_UNDERSTOOD: Final = 1024
#: Bytes that a load command may grow by when it is given: by figures, and by the scale of each adapter.
_LATER_BYTES: Final = 64


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """Where a worker runs, and with what environment.

    Attributes:
        gpus: The only GPUs that it sees, as ``CUDA_VISIBLE_DEVICES`` names them (``nvidia-smi``'s numbers, or UUIDs);
            none for ``()``, all for None. For other makes of GPU set their variable in ``env``.
        cores: The only cores that its threads run on; all for ``()``. Its default number of threads follows.
        env: Further environment variables.
    """

    gpus: tuple[str, ...] | None = None
    cores: tuple[int, ...] = ()
    env: dict[str, str] = {}

    def environment(self) -> dict[str, str]:
        """Return the variables that make a worker run there."""
        found = dict(self.env)
        if self.gpus is not None:
            found = {**_CUDA_ORDER, **found, CUDA_ENV: ",".join(self.gpus)}
        if self.cores:
            found[CORES_ENV] = ",".join(map(str, self.cores))
        return found

    def check(self) -> None:
        """Raise :class:`~llamaherd.pool.errors.BadRequest` if it cannot be an environment, or names no core."""
        for name, value in self.environment().items():
            if not name or "=" in name or "\0" in name + value:
                raise BadRequest(f"environment variable {name!r} has an impossible name or value")
        if any(core < 0 for core in self.cores):
            raise BadRequest("cores are counted from 0")


class BrokenModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model of a catalogue that cannot be used: it is listed as failed, with the reason, and refuses requests.

    Attributes:
        name: What clients call it, as in :class:`ModelSpec`.
        reason: Why it cannot be used, for people.
    """

    name: str
    reason: str
    aliases: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    path: Path | None = None


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One model of the pool.

    Attributes:
        name: What clients call it: 1 to 256 printable characters.
        path: The GGUF file (the first one, if it is split). Not needed by the fake engine.
        options: How the engine loads it.
        aliases: Further names for it.
        tags: Words for listings; the pool makes nothing of them.
        stop_timeout: Seconds from the exit command to the kill; None takes the pool's.
        pinned: Never stopped to make room for another, and not unloaded for idleness.
        priority: Of its requests, where they name none; higher goes first.
        load_on_startup: Load it when the pool is entered.
        sleep_idle_seconds: Idle seconds after which it frees its memory and keeps its process; None means never.
        unload_idle_seconds: Idle seconds, counted from falling asleep if it sleeps, after which its process ends; None
            means never.
        memory: Bytes that it takes, where they are known; None estimates them from the file and measures them later.
        queue_max: Most requests that wait for it; 0 means no limit, None takes the pool's.
        queue_timeout: Seconds that a request may wait for it, where the request itself sets no limit; 0 means no limit,
            None takes the pool's.
        load_stall_seconds: Seconds without any sign of progress (a step of the load, a log line) after which a load is
            given up. There is no limit to a load that goes on; 0 never gives up.
        replicas: Most workers of it at a time. The first starts with the first request, a further one when more
            requests wait than there are slots and there is room to spare; each idles by itself.
        placements: Where its workers run: the first replica at the first, and so on, again from the start if there are
            fewer; anywhere for ``()``.
        engine: ``llama``, or ``fake`` for the scripted engine.
        defaults: Parameters of its requests where they say nothing else, in place of the pool's own; see
            :class:`~llamaherd.pool.params.GenerateParams`. A grammar or schema among them counts for requests without a
            grammar, a schema, a ``response_format`` and tools.
        source: Where it comes from: ``preset`` (a preset file, the command line or code), ``models_dir`` or ``cache``.
        preset: The settings that made it, as a section of a preset file without names and secrets; for listings.
        repo: Its name on the Hugging Face hub, ``user/repo[:quant]``, or in a registry, ``registry/repo:tag``.
        origin: What is downloaded before it is loaded, while it has no path; ``repo`` by default.
        mmproj: The multimodal projector that goes with it.
        script: The fake engine's script, see :mod:`llamaherd.pool.child.fake_engine`.
    """

    name: str
    path: Path | None = None
    options: EngineOptions = EngineOptions()
    aliases: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    stop_timeout: float | None = None
    pinned: bool = False
    priority: int = 0
    load_on_startup: bool = False
    sleep_idle_seconds: float | None = None
    unload_idle_seconds: float | None = None
    memory: int | None = None
    queue_max: int | None = None
    queue_timeout: float | None = None
    load_stall_seconds: float = DEFAULT_LOAD_STALL
    replicas: int = 1
    placements: tuple[Placement, ...] = ()
    engine: str = "llama"
    defaults: dict[str, Any] = {}
    source: Source = "preset"
    preset: str = ""
    repo: str = ""
    origin: Origin | None = None
    mmproj: Path | None = None
    script: dict[str, Any] = {}

    def check(self) -> None:
        """Raise :class:`~llamaherd.pool.errors.BadRequest` if the spec is wrong in a way that can be seen without
        loading.
        """
        for name in (self.name, *self.aliases):
            check_name(name)
        if self.engine not in ("llama", "fake"):
            raise BadRequest(f"model {self.name!r}: unknown engine {self.engine!r}, known are llama and fake")
        missing = self.missing()
        if missing is not None:
            missing.check()
        elif self.engine == "llama" and self.path is None:
            raise BadRequest(f"model {self.name!r} has no path")
        for adapter in self.options.adapters:
            if not abs(adapter.scale) <= MOST_SCALE:
                raise BadRequest(
                    f"model {self.name!r}: the scale of {adapter.path} must be {-MOST_SCALE:g} to {MOST_SCALE:g}"
                )
        if self.options.n_parallel < 1:
            raise BadRequest(f"model {self.name!r}: n_parallel must be 1 or more")
        if not 1 <= self.replicas <= MAX_REPLICAS:
            raise BadRequest(f"model {self.name!r}: replicas must be 1 to {MAX_REPLICAS}")
        for placement in self.placements:
            placement.check()
        self._check_load()
        from llamaherd.pool.params import check_defaults  # which needs this module's bounds

        try:
            check_defaults(self.defaults)
        except BadRequest as error:
            raise BadRequest(f"model {self.name!r}: {error}") from None
        if self.memory is not None and self.memory < 0:
            raise BadRequest(f"model {self.name!r}: memory must be a number of bytes, 0 or more")
        if self.queue_max is not None and self.queue_max < 0:
            raise BadRequest(f"model {self.name!r}: queue_max must be 0 or more")
        for field in (
            "stop_timeout",
            "queue_timeout",
            "sleep_idle_seconds",
            "unload_idle_seconds",
            "load_stall_seconds",
        ):
            seconds = getattr(self, field)
            if seconds is not None and not 0 <= seconds < float("inf"):
                raise BadRequest(f"model {self.name!r}: {field} must be a finite number of seconds, 0 or more")

    def _check_load(self) -> None:
        """Raise BadRequest if a worker would not understand the command to load this."""
        options = self.options
        # Of a catalogue's models many have the same options, and those are by far the most of the command.
        plain = not self.script and self.tags == () and str(self.path or "").isascii() and not self.mmproj
        if plain and _UNDERSTOOD.get(id(options)) is options:
            return
        try:
            kind, body = encode(self.to_load())
            understood = decode(kind, body)
        except (TypeError, ValueError, RecursionError, OverflowError) as error:
            raise BadRequest(f"model {self.name!r} cannot be written as JSON: {error}") from None
        most = MAX_MESSAGE_BYTES - _LATER_BYTES * (1 + len(options.adapters))
        if len(body) > most:
            raise BadRequest(
                f"model {self.name!r}: what a worker is to be told of it has {len(body)} bytes, and at most {most} are "
                "allowed; its chat template or its other texts are too long"
            )
        if isinstance(understood, Unknown):
            raise BadRequest(f"model {self.name!r}: {understood.reason}")
        if len(_UNDERSTOOD) >= _MOST_UNDERSTOOD:
            _UNDERSTOOD.clear()
        _UNDERSTOOD[id(options)] = options

    def missing(self) -> Origin | None:
        """Return what has to be downloaded before it can be loaded; None if nothing has."""
        if self.path is not None:
            return None
        return self.origin or (Origin(repo=self.repo) if self.repo and self.engine == "llama" else None)

    @property
    def may_be_gone(self) -> bool:
        """Whether its files have to be looked for before it is started: they are not there yet, or can be had again."""
        return self.origin is not None or self.missing() is not None

    def with_template(self, template: str) -> "ModelSpec":
        """Return it with the chat template that came with its file, unless it names another."""
        if self.options.chat_template or not template:
            return self
        return msgspec.structs.replace(self, options=msgspec.structs.replace(self.options, chat_template=template))

    def placement(self, replica: int) -> Placement:
        """Return where a replica runs."""
        return self.placements[replica % len(self.placements)] if self.placements else Placement()

    @property
    def is_placed(self) -> bool:
        """Whether its workers run where they are told to, and not wherever the pool does."""
        return bool(self.placements)

    def runs_as(self, other: "ModelSpec", replica: int = 0) -> bool:
        """Whether a worker that was started for the other spec serves this one just as well."""
        addresses = {spec.origin.address for spec in (self, other) if spec.origin is not None} - {""}
        if len(addresses) > 1:
            return False  # one path, and not one file
        ours, theirs = (msgspec.structs.replace(spec.to_load(), aliases=(), tags=()) for spec in (self, other))
        return ours == theirs and self.placement(replica) == other.placement(replica)

    def to_load(self, scales: Sequence[float] | None = None) -> Load:
        """Return the message that makes a worker load this model; ``scales`` of its LoRA adapters replace its own."""
        options = self.options
        if scales is not None:
            pairs = zip(options.adapters, scales, strict=True)
            adapters = tuple(msgspec.structs.replace(adapter, scale=scale) for adapter, scale in pairs)
            options = msgspec.structs.replace(options, adapters=adapters)
        return Load(
            model=self.name,
            path="" if self.path is None else str(self.path),
            mmproj="" if self.mmproj is None else str(self.mmproj),
            engine=self.engine,
            options=options,
            aliases=self.aliases,
            tags=self.tags,
            script=self.script,
        )


def check_name(name: str) -> str:
    """Return the name, or raise :class:`~llamaherd.pool.errors.BadRequest` if it cannot be a model's."""
    if not name or len(name) > MAX_NAME_LENGTH or not name.isprintable():
        shown = ascii(name[:60])
        raise BadRequest(
            f"model name {shown} must be 1 to {MAX_NAME_LENGTH} printable characters", code="invalid_model"
        )
    return name
