"""What becomes of a model that nobody uses. Pure: the pool owns the clock."""

from typing import Literal, NamedTuple

from llamaherd.pool.config import ModelSpec
from llamaherd.pool.lifecycle import State

__all__ = ["Rest", "rest_of"]


class Rest(NamedTuple):
    """What to do after so many idle seconds."""

    action: Literal["sleep", "unload"]
    seconds: float


def rest_of(spec: ModelSpec, state: State, keep_alive: float | None, *, spare: bool = False) -> Rest | None:
    """Return what is next for an idle model in a state, counted from when it came into that state or its last request
    ended.

    A loaded model sleeps, if its spec says when, and then unloads after the further time that the spec says; without a
    time for sleep it unloads from loaded. ``keep_alive`` of the last request takes the place of both: the model
    unloads after so many seconds, never if it is negative. A pinned model is never unloaded, unless this replica is
    ``spare``, so that others are left; it may sleep.
    """
    stays = spec.pinned and not spare
    if state is State.LOADED and keep_alive is not None:
        return Rest("unload", keep_alive) if keep_alive >= 0 and not stays else None
    if state is State.LOADED and spec.sleep_idle_seconds is not None:
        return Rest("sleep", spec.sleep_idle_seconds)
    if state in (State.LOADED, State.SLEEPING) and spec.unload_idle_seconds is not None and not stays:
        return Rest("unload", spec.unload_idle_seconds)
    return None
