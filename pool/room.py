"""Room for processes: places and bytes, what there is of them and what is taken."""

from dataclasses import dataclass

__all__ = ["Limits", "Room"]


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
