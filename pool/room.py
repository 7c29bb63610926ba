"""Room for processes: places and bytes, what there is of them and what is taken."""

from dataclasses import dataclass
from typing import Final

__all__ = ["Ledger", "Limits", "Room"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The numbers in the scheduler's rules.

    Attributes:
        models_max: Most processes; 0 means no limit.
        memory_budget: Most bytes that all processes together may take; 0 means no limit.
        max_overtakes: How often a model that waits for room may be overtaken before another is drained for it; at least
            1.
        cores: Cores to divide among the processes that are busy; 0 leaves the threads alone.
        queue_max: Most requests that wait, in total; 0 means no limit.
        queue_max_per_model: Most requests that wait for one model; 0 means no limit.
    """

    models_max: int = 4
    memory_budget: int = 0
    max_overtakes: int = 16
    cores: int = 0
    queue_max: int = 0
    queue_max_per_model: int = 0

    def allow(self, room: "Room") -> bool:
        """Whether processes may take so much."""
        places = not self.models_max or room.places <= self.models_max
        return places and (not self.memory_budget or room.memory <= self.memory_budget)


@dataclass(frozen=True, slots=True)
class Room:
    """What processes take: places, and bytes of memory as far as they are known."""

    places: int = 0
    memory: int = 0

    def __add__(self, other: "Room") -> "Room":
        return Room(self.places + other.places, self.memory + other.memory)

    def __sub__(self, other: "Room") -> "Room":
        return Room(self.places - other.places, self.memory - other.memory)


class Ledger:
    """What all processes take, and those of them that are told to stop.

    With a memory budget, a process that is told to stop and whose bytes are known gives up its place at once, and its
    bytes when it is gone. So the next one can start beside it, but only where both are known to fit.

    Attributes:
        used: What is taken now.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits: Final = limits
        self.used = Room()
        self._leaving = Room()
        self._ghosts = 0

    def count(self, memory: int, *, stopping: bool, sign: int) -> None:
        """A process takes (1), or no longer takes (-1), so many bytes; 0 if nobody knows how many."""
        ghost = stopping and self._limits.memory_budget > 0 and memory > 0
        room = Room(0 if ghost else sign, sign * memory)
        self.used += room
        if stopping:
            self._leaving += room
            self._ghosts += sign * ghost

    def need(self, memory: int) -> Room:
        """Return what a start takes. What is not known may not start beside what is leaving."""
        return Room(1 if memory else 1 + self._ghosts, memory)

    def fits(self, need: Room) -> bool:
        """Whether there is so much room now."""
        return self._limits.allow(self.used + need)

    def will_fit(self, need: Room) -> bool:
        """Whether there is so much room once what is told to stop is gone."""
        return self._limits.allow(self.after_exits(need))

    def after_exits(self, need: Room) -> Room:
        """Return what is taken once what is told to stop is gone, and something has started."""
        return self.used - self._leaving + need
