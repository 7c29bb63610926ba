"""The command line's options of the pool: how much may run at a time, and what becomes of models that nobody uses."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import click
import msgspec

from llamaherd.http.options import Whole
from llamaherd.http.sampling_options import SAMPLING_OPTIONS, sampling_defaults
from llamaherd.pool import BadRequest, ModelSpec, check_defaults

__all__ = ["PoolSettings", "pool_options"]

_Command = Callable[..., Any]
_MIB: Final = 1024 * 1024
_DAY: Final = 86400.0
#: The settings that are the pool's and no model's.
_POOLS_OWN: Final = (
    "models_max",
    "memory_budget",
    "queue_max",
    "queue_max_per_model",
    "queue_timeout",
    "spare",
    "reuse_workers",
)


class _Budget(click.ParamType[int | Literal["auto"]]):
    """A number of MiB, as bytes, or ``auto``."""

    name = "mib"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | Literal["auto"]:
        if value == "auto":
            return "auto"
        return Whole(0).convert(value, param, ctx) * _MIB


@dataclass(frozen=True, kw_only=True)
class PoolSettings:
    """What the options say: arguments of ``Pool`` and fields of ``ModelSpec`` by their names; -1 seconds mean never."""

    models_max: int
    memory_budget: int | Literal["auto"]
    queue_max: int
    queue_max_per_model: int
    queue_timeout: float
    spare: bool
    reuse_workers: bool
    sleep_idle_seconds: float
    unload_idle_seconds: float
    replicas: int
    load_stall_seconds: float
    defaults: dict[str, Any]

    def to_pool(self) -> dict[str, Any]:
        """Return the arguments of ``Pool``."""
        return {name: getattr(self, name) for name in _POOLS_OWN}

    def apply(self, specs: Sequence[ModelSpec]) -> tuple[ModelSpec, ...]:
        """Return the models with the idle times, the number of replicas and the defaults of requests in them."""
        times: dict[str, Any] = {
            "sleep_idle_seconds": _seconds(self.sleep_idle_seconds),
            "unload_idle_seconds": _seconds(self.unload_idle_seconds),
            "load_stall_seconds": self.load_stall_seconds,
            "replicas": self.replicas,
            "defaults": self.defaults,
        }
        return tuple(msgspec.structs.replace(spec, **times) for spec in specs)


def _seconds(value: float) -> float | None:
    return None if value < 0 else value


def _option(*names: str, **settings: Any) -> Callable[[_Command], _Command]:
    return click.option(*names, show_default=settings.pop("show_default", True), **settings)


_OPTIONS: Final[Sequence[Callable[[_Command], _Command]]] = (
    _option(
        "--models-max",
        type=Whole(0),
        metavar="N",
        default=4,
        envvar="LLAMA_ARG_MODELS_MAX",
        help="Most models loaded at a time. 0 sets no limit.",
    ),
    _option(
        "--memory-budget",
        type=_Budget(),
        metavar="MIB",
        default="auto",
        help="Most memory of all loaded models together, in MiB: estimated from the file before a model's first load, "
        "measured after it. 0 sets no limit. auto is 80 % of what is free at the start, and 90 % of each NVIDIA GPU "
        "where nvidia-ml-py is installed; a model that does not fit alone then runs alone.",
    ),
    _option("--queue-max", type=Whole(0), metavar="N", default=1024, help="Most requests that wait. 0 sets no limit."),
    _option(
        "--queue-max-per-model",
        type=Whole(0),
        metavar="N",
        default=0,
        help="Most requests that wait for one model. 0 sets no limit.",
    ),
    _option(
        "--queue-timeout",
        type=click.FloatRange(0, _DAY),
        metavar="SECONDS",
        default=0.0,
        help="Time that a request may wait for its model, loading included, before it is answered with 503. 0 sets no "
        "limit.",
    ),
    _option(
        "--spare/--no-spare",
        default=False,
        help="Keep a worker ready without a model, so that the next load does not wait for the start of a process. "
        "With a memory budget it also loads ahead what is likely wanted next, where that fits beside what runs.",
    ),
    _option(
        "--reuse-workers/--no-reuse-workers",
        default=True,
        help="Let the worker of a model that makes room for another become the other's, which makes swaps faster. "
        "Without it no process ever serves two models.",
    ),
    _option(
        "--replicas",
        type=Whole(1, 64),
        metavar="N",
        default=1,
        help="Most workers of one model. A further one starts when more requests wait than there are slots and there "
        "is room to spare.",
    ),
    _option(
        "--sleep-idle-seconds",
        type=click.FloatRange(-1, _DAY * 365),
        metavar="SECONDS",
        default=-1.0,
        help="Idle time after which a model frees its memory and keeps its process. -1 means never.",
    ),
    _option(
        "--unload-idle-seconds",
        type=click.FloatRange(-1, _DAY * 365),
        metavar="SECONDS",
        default=-1.0,
        help="Idle time, counted from falling asleep if it sleeps, after which a model's process ends. -1 means never.",
    ),
    _option(
        "--load-stall-seconds",
        type=click.FloatRange(0, _DAY),
        metavar="SECONDS",
        default=300.0,
        help="Time without any sign of progress after which a load is given up. 0 never gives up.",
    ),
)


def pool_options(command: _Command) -> _Command:
    """Add the options to a command, which gets them as the argument ``pool`` of type :class:`PoolSettings`."""

    @functools.wraps(command)
    def with_settings(*args: Any, **values: Any) -> Any:
        defaults = sampling_defaults(values)
        try:
            check_defaults(defaults)
        except BadRequest as error:
            raise click.UsageError(f"{error}.") from None
        fields = {name: values.pop(name) for name in PoolSettings.__annotations__ if name != "defaults"}
        return command(*args, pool=PoolSettings(**fields, defaults=defaults), **values)

    decorated: _Command = with_settings
    for option in reversed((*_OPTIONS, *SAMPLING_OPTIONS)):
        decorated = option(decorated)
    return decorated
