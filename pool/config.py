"""What a model is, to the pool: its name, its file and how to load it."""

from pathlib import Path
from typing import Any, Final

import msgspec

from llamaherd.pool.errors import BadRequest
from llamaherd.transport.messages import EngineOptions, Load

__all__ = ["DEFAULT_STOP_TIMEOUT", "MAX_NAME_LENGTH", "EngineOptions", "ModelSpec", "check_name"]

#: Seconds between the exit command and the kill; the reference's default.
DEFAULT_STOP_TIMEOUT: Final = 10.0
MAX_NAME_LENGTH: Final = 256


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One model of the pool.

    Attributes:
        name: What clients call it: 1 to 256 printable characters.
        path: The GGUF file (the first one, if it is split). Not needed by the fake engine.
        options: How the engine loads it.
        aliases: Further names for it.
        tags: Words for listings; the pool makes nothing of them.
        stop_timeout: Seconds from the exit command to the kill; None takes the pool's.
        engine: ``llama``, or ``fake`` for the scripted engine.
        script: The fake engine's script, see :mod:`llamaherd.pool.child.fake_engine`.
    """

    name: str
    path: Path | None = None
    options: EngineOptions = EngineOptions()
    aliases: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    stop_timeout: float | None = None
    engine: str = "llama"
    script: dict[str, Any] = {}

    def check(self) -> None:
        """Raise :class:`~llamaherd.pool.errors.BadRequest` if the spec is wrong in a way that can be seen without
        loading.
        """
        for name in (self.name, *self.aliases):
            check_name(name)
        if self.engine not in ("llama", "fake"):
            raise BadRequest(f"model {self.name!r}: unknown engine {self.engine!r}, known are llama and fake")
        if self.engine == "llama" and self.path is None:
            raise BadRequest(f"model {self.name!r} has no path")
        if self.stop_timeout is not None and not 0 <= self.stop_timeout < float("inf"):
            raise BadRequest(f"model {self.name!r}: stop_timeout must be a finite number of seconds, 0 or more")

    def to_load(self) -> Load:
        """Return the message that makes a worker load this model."""
        return Load(
            model=self.name,
            path="" if self.path is None else str(self.path),
            engine=self.engine,
            options=self.options,
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
