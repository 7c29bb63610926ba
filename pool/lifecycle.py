"""States of a model and the moves between them, as one table.

The state names that leave the pool are llama.cpp's own; ``stopping`` is ours, between the stop command and the
process's end. Three rules, kept here and nowhere else:

1. A missing entry in :data:`TRANSITIONS` is an error of whoever asked for the move; nothing changes.
2. ``exit`` is a fact of the operating system and is possible in every state that has a process.
3. Messages of a worker move a model only while that worker is its current one, and never out of ``stopping``.
"""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final

__all__ = ["RUNNING", "TRANSITIONS", "IllegalTransition", "State", "Trigger", "transition"]


class State(StrEnum):
    """Where a model is in its life. The values are the words on the wire and in ``GET /models``."""

    UNLOADED = "unloaded"
    DOWNLOADING = "downloading"
    DOWNLOADED = "downloaded"
    LOADING = "loading"
    LOADED = "loaded"
    SLEEPING = "sleeping"
    STOPPING = "stopping"


class Trigger(StrEnum):
    """What can move a model: decisions of the pool, messages of the worker, and the process's end."""

    SPAWN = "spawn"
    DOWNLOAD = "download"
    PROGRESS = "progress"
    READY = "ready"
    SLEEP = "sleep"
    FETCHED = "fetched"
    STOP = "stop"
    EXIT = "exit"


class IllegalTransition(RuntimeError):
    """The table has no entry for this trigger in this state."""


def _table() -> Mapping[State, Mapping[Trigger, State]]:
    table: dict[State, dict[Trigger, State]] = {
        State.UNLOADED: {Trigger.SPAWN: State.LOADING, Trigger.DOWNLOAD: State.DOWNLOADING},
        State.DOWNLOADING: {
            Trigger.PROGRESS: State.DOWNLOADING,
            Trigger.FETCHED: State.DOWNLOADED,
            Trigger.STOP: State.STOPPING,
            Trigger.EXIT: State.UNLOADED,
        },
        State.DOWNLOADED: {Trigger.STOP: State.STOPPING, Trigger.EXIT: State.UNLOADED},
        State.LOADING: {
            Trigger.PROGRESS: State.LOADING,
            Trigger.READY: State.LOADED,
            Trigger.STOP: State.STOPPING,
            Trigger.EXIT: State.UNLOADED,
        },
        State.LOADED: {
            Trigger.READY: State.LOADED,  # woken before it had the time to fall asleep
            Trigger.SLEEP: State.SLEEPING,
            Trigger.STOP: State.STOPPING,
            Trigger.EXIT: State.UNLOADED,
        },
        State.SLEEPING: {
            Trigger.PROGRESS: State.LOADING,
            Trigger.STOP: State.STOPPING,
            Trigger.EXIT: State.UNLOADED,
        },
        State.STOPPING: {Trigger.EXIT: State.UNLOADED},
    }
    return MappingProxyType({state: MappingProxyType(moves) for state, moves in table.items()})


#: state -> trigger -> next state.
TRANSITIONS: Final = _table()

#: States in which the model has a process.
RUNNING: Final = frozenset(state for state, moves in TRANSITIONS.items() if Trigger.EXIT in moves)


def transition(state: State, trigger: Trigger) -> State:
    """Return the state that follows, or raise :class:`IllegalTransition`."""
    try:
        return TRANSITIONS[state][trigger]
    except KeyError:
        raise IllegalTransition(f"a model that is {state} cannot {trigger}") from None
