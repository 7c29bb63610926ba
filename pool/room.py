"""Room for processes: places and bytes, what there is of them and what is taken."""

from dataclasses import dataclass, replace
from itertools import zip_longest
from operator import le
from typing import Final

__all__ = ["Ledger", "Limits", "Room"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The numbers in the scheduler's rules.

    Attributes:
        models_max: Most processes; 0 means no limit.
        memory_budget: Most bytes of this machine's memory that all processes together may take; 0 means no limit.
        gpu_budgets: The same of each GPU that is counted; none for ``()``.
        max_overtakes: How often a model that waits for room may be overtaken before another is drained for it; at least
            1.
        cores: Cores to divide among the processes that are busy; 0 leaves the threads alone.
        queue_max: Most requests that wait, in total; 0 means no limit.
        queue_max_per_model: Most requests that wait for one model; 0 means no limit.
    """

    models_max: int = 4
    memory_budget: int = 0
    gpu_budgets: tuple[int, ...] = ()
    max_overtakes: int = 16
    cores: int = 0
    queue_max: int = 0
    queue_max_per_model: int = 0

    @property
    def budgeted(self) -> bool:
        """Whether any memory is counted."""
        return self.memory_budget > 0 or bool(self.gpu_budgets)

    def allow(self, room: "Room") -> bool:
        """Whether processes may take so much."""
        places = not self.models_max or room.places <= self.models_max
        memory = not self.memory_budget or room.memory <= self.memory_budget
        return places and memory and all(map(le, room.gpus, self.gpu_budgets))

    def clamp(self, room: "Room") -> "Room":
        """Return no more than all of the memory there is."""
        memory = min(room.memory, self.memory_budget) if self.memory_budget else room.memory
        return Room(room.places, memory, tuple(map(min, room.gpus, self.gpu_budgets)))


@dataclass(frozen=True, slots=True)
class Room:
    """What processes take: places, and bytes of this machine's memory and of each GPU, as far as they are known."""

    places: int = 0
    memory: int = 0
    gpus: tuple[int, ...] = ()

    def __add__(self, other: "Room") -> "Room":
        gpus = tuple(map(sum, zip_longest(self.gpus, other.gpus, fillvalue=0)))
        return Room(self.places + other.places, self.memory + other.memory, gpus)

    def __sub__(self, other: "Room") -> "Room":
        return self + other * -1

    def __mul__(self, factor: int) -> "Room":
        return Room(self.places * factor, self.memory * factor, tuple(gpu * factor for gpu in self.gpus))

    def meets(self, other: "Room") -> bool:
        """Whether both take of one GPU."""
        return any(map(min, self.gpus, other.gpus))

    @property
    def total(self) -> int:
        """All of its bytes, wherever they are."""
        return self.memory + sum(self.gpus)


class Ledger:
    """What all processes take, and those of them that are told to stop.

    With a memory budget, a process that is told to stop and whose bytes are known gives up its place at once, and its
    bytes when it is gone. So the next one can start beside it, but only where both are known to fit.

    Attributes:
        used: What is taken now.
        ahead: What of that a spare holds, of a model loaded ahead, and gives up to whatever takes the spare.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits: Final = limits
        self.used = Room()
        self.ahead = Room()
        self._leaving = Room()
        self._ghosts = 0
        #: What a spare holds that is told to stop.
        self._dropped = Room()

    def count(self, room: Room, *, stopping: bool, sign: int) -> None:
        """A process takes (1), or no longer takes (-1), a place and so many bytes; 0 if nobody knows how many."""
        ghost = stopping and self._limits.budgeted and room.total > 0
        room = replace(room, places=0 if ghost else 1) * sign
        self.used += room
        if stopping:
            self._leaving += room
            self._ghosts += sign * ghost

    @property
    def lends(self) -> bool:
        """Whether a spare holds any, or did and is not gone yet."""
        return self.ahead.total > 0 or self._dropped.total > 0

    def load_ahead(self, room: Room) -> None:
        """A spare takes so many bytes, and no place."""
        self.ahead = replace(room, places=0)
        self.used += self.ahead

    def drop_ahead(self) -> None:
        """The spare that has taken them is told to stop."""
        self._dropped, self.ahead = self.ahead, Room()
        self._leaving += self._dropped

    def end_ahead(self) -> None:
        """It is gone, or has become another process, which is counted for itself."""
        self.used -= self.ahead + self._dropped
        self._leaving -= self._dropped
        self.ahead = self._dropped = Room()

    def need(self, room: Room) -> Room:
        """Return what a start takes. What is not known may not start beside what is leaving."""
        if room.total:
            return room
        return replace(room, places=1 + self._ghosts + (self._dropped.total > 0))

    def fits(self, need: Room) -> bool:
        """Whether there is so much room now."""
        return self._limits.allow(self.used + need)

    def will_fit(self, need: Room) -> bool:
        """Whether there is so much room once what is told to stop is gone."""
        return self._limits.allow(self.after_exits(need))

    def after_exits(self, need: Room) -> Room:
        """Return what is taken once what is told to stop is gone, and something has started."""
        return self.used - self._leaving + need
