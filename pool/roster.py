"""The scheduler's records: models, their processes, and the requests that wait. Data and small questions about it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final, TypeAlias

from llamaherd.pool.affinity import Prefixes
from llamaherd.pool.room import Room

__all__ = ["AFFINITY_SLACK", "Instance", "Key", "Model", "Phase", "Waiting"]

#: How many more requests than the least busy one an instance may have, and still be preferred for its prefix.
AFFINITY_SLACK: Final = 2

#: A model's name and the number of one of its replicas, from 0 on.
Key: TypeAlias = tuple[str, int]


class Phase(Enum):
    """What the scheduler knows of one process."""

    ABSENT = auto()
    STARTING = auto()
    READY = auto()
    ASLEEP = auto()
    STOPPING = auto()


#: Phases in which a process serves, or will without a new start.
_LIVE = frozenset({Phase.STARTING, Phase.READY, Phase.ASLEEP})


@dataclass(slots=True)
class Waiting:
    """A request that waits for its model, or holds it.

    Attributes:
        holds: Whether it keeps the model busy once it is granted.
        prefix: The keys of its prompt; see :func:`~llamaherd.pool.affinity.prefix_keys`.
        instance: Where it was granted; None while it waits.
    """

    ticket: int
    model: "Model"
    priority: int
    holds: bool
    prefix: tuple[int, ...]
    instance: "Instance | None" = None


@dataclass(slots=True, eq=False)
class Instance:
    """One process of a model, or the place for one.

    Attributes:
        key: What effects and events call it.
        granted: The requests that hold it, by their tickets.
        errands: How many things it does beside requests that are not to be cut short, such as to save a slot.
        last_used: The scheduler's count of uses at its last one.
        room: What it takes.
        drained_for: The model that it takes no new requests for the sake of.
        victim_of: The model whose second start waits for its end.
        retiring: It takes no new requests and is stopped when it has finished what it has.
        prefixes: The prompts that it has seen; only kept where a model has several replicas.
    """

    model: "Model"
    index: int
    key: Key = field(init=False)
    phase: Phase = Phase.ABSENT
    granted: dict[int, Waiting] = field(default_factory=dict[int, Waiting])
    errands: int = 0
    last_used: int = 0
    room: Room = Room(places=1)
    drained_for: "Model | None" = None
    victim_of: "Model | None" = None
    retiring: bool = False
    prefixes: Prefixes = field(default_factory=Prefixes)

    def __post_init__(self) -> None:
        self.key = (self.model.name, self.index)

    @property
    def in_flight(self) -> int:
        """How many requests hold it."""
        return len(self.granted)

    @property
    def idle(self) -> bool:
        """Whether it has its model, or gets it again when it is asked, and nobody uses it."""
        # Not a set of phases: an enum's hash is computed by Python code.
        at_rest = self.phase is Phase.READY or self.phase is Phase.ASLEEP
        return at_rest and not self.granted and not self.errands

    @property
    def live(self) -> bool:
        """Whether it serves, or will without a new start."""
        return self.phase in _LIVE and not self.retiring

    def takes(self, waiting: Waiting) -> bool:
        """Whether a request can go to it now."""
        if self.phase is not Phase.READY or self.retiring or self.drained_for is not None:
            return False
        slots = self.model.slots
        return not waiting.holds or not slots or len(self.granted) < slots


@dataclass(slots=True, eq=False)
class Model:
    """One model.

    Attributes:
        slots: Most requests granted to one instance; 0 means no limit.
        replicas: Most instances that may run.
        pinned: Its last instance is never stopped to make room.
        queue_max: Most requests that may wait for it; 0 means no limit, None that of all models.
        placed: Its processes run where they are told to, so a spare cannot become one.
        rooms: What instances are expected to take: the first the first, and so on, again from the start if there are
            fewer.
        instances: By their number. Those beyond ``replicas`` are leftovers that retire.
        overtaken: How often its waiting requests were overtaken by others for models that are in its way; kept by the
            :class:`~llamaherd.pool.line.Line`, which counts on from it while the model is hungry.
        queues: By priority, requests by their tickets in the order of their arrival; no empty ones are kept.
        waiting: How many requests wait.
        holding: How many of these will hold it.
        second_try: It was short of memory, and another was stopped for its second start.
        victim: The instance that was; the second start waits for its end.
        awaits_spare: The second start waits for the end of a spare, for what that had loaded ahead.
        stunted: Its last attempt to start a further replica failed.
    """

    name: str
    slots: int
    replicas: int
    pinned: bool
    queue_max: int | None = None
    placed: bool = False
    rooms: list[Room] = field(default_factory=lambda: [Room(places=1)])
    instances: list[Instance] = field(default_factory=list[Instance])
    overtaken: int = 0
    queues: dict[int, dict[int, Waiting]] = field(default_factory=dict[int, dict[int, Waiting]])
    waiting: int = 0
    holding: int = 0
    second_try: bool = False
    victim: Instance | None = None
    awaits_spare: bool = False
    stunted: bool = False

    @property
    def head(self) -> Waiting:
        """The request that is next. There must be one."""
        return next(iter(self.queues[max(self.queues)].values()))

    @property
    def live(self) -> bool:
        """Whether any instance serves, or will without a new start."""
        return any(instance.live for instance in self.instances)

    @property
    def startable(self) -> Instance | None:
        """An instance that may be started, None if all run or are on their way out."""
        for instance in self.instances[: self.replicas]:
            if instance.phase is Phase.ABSENT:
                return instance
        return None

    @property
    def next_room(self) -> Room:
        """What the next start is expected to take."""
        instance = self.startable
        return self.rooms[0 if instance is None else instance.index % len(self.rooms)]

    @property
    def hungry(self) -> bool:
        """Whether it is waited for, and has nothing that serves, and something that can be started."""
        if not self.waiting or self.live or self.startable is None or self.awaits_spare:
            return False
        return self.victim is None or self.victim.phase is not Phase.STOPPING

    @property
    def coming(self) -> int:
        """Slots of the instances that are starting."""
        return self.slots * sum(one.phase is Phase.STARTING and not one.retiring for one in self.instances)

    @property
    def drained(self) -> bool:
        """Whether any instance is drained for another model."""
        return any(instance.drained_for is not None for instance in self.instances)

    @property
    def lacks_slots(self) -> bool:
        """Whether more wait than the instances that are awake or starting will take."""
        awake = any(one.live and one.phase is not Phase.ASLEEP for one in self.instances)
        return not awake or (self.slots > 0 and self.holding > self.coming and not self.drained)

    def choose(self, waiting: Waiting) -> Instance | None:
        """Return the instance that a request would go to now; None if it has to wait."""
        if len(self.instances) == 1:
            (only,) = self.instances
            return only if only.takes(waiting) else None
        able = [instance for instance in self.instances if instance.takes(waiting)]
        if len(able) <= 1:
            return able[0] if able else None
        least = min(instance.in_flight for instance in able)
        near = [instance for instance in able if instance.in_flight <= least + AFFINITY_SLACK]
        # The first of equals, so that the later ones come to rest when there is less to do.
        return max(near, key=lambda one: (one.prefixes.match(waiting.prefix), -one.in_flight, -one.index))

    def resize(self, replicas: int) -> None:
        """Have so many replicas from now on; places of absent ones beyond them go, the others are the caller's."""
        self.replicas = replicas
        while len(self.instances) < replicas:
            self.instances.append(Instance(self, len(self.instances)))
        self.trim()

    def trim(self) -> None:
        """Forget the places beyond the replicas, as far as they are empty."""
        while len(self.instances) > self.replicas and self.instances[-1].phase is Phase.ABSENT:
            self.instances.pop()

    @property
    def may_grow(self) -> bool:
        """Whether a further instance would start if there were room to spare."""
        if self.replicas <= 1 or self.stunted or not self.waiting or self.hungry:
            return False
        return self.lacks_slots and self.startable is not None

    def put(self, waiting: Waiting) -> None:
        """A request begins to wait, or waits again: it keeps its place among those of its priority."""
        queue = self.queues.setdefault(waiting.priority, {})
        newest = next(reversed(queue), 0)
        queue[waiting.ticket] = waiting
        if waiting.ticket < newest:
            self.queues[waiting.priority] = dict(sorted(queue.items()))
        self.waiting += 1
        self.holding += waiting.holds

    def remove(self, waiting: Waiting) -> None:
        """A request waits no more."""
        queue = self.queues[waiting.priority]
        del queue[waiting.ticket]
        if not queue:
            del self.queues[waiting.priority]
        self.waiting -= 1
        self.holding -= waiting.holds

    def in_turn(self) -> Iterator[Waiting]:
        """Yield the waiting requests in the order of their turns."""
        for priority in sorted(self.queues, reverse=True):
            yield from self.queues[priority].values()
