"""Which model runs, and which request goes to it: the decision, without doing any of it.

Events come in as method calls; what follows from them goes out through :class:`Effects`, which must only take note and
return. There is no clock, no process and no I/O here, so every rule can be tested by itself.

The rules:

1. A request holds its model from the moment that it is accepted: a waiting request makes the model *wanted*, a granted
   one makes it *busy*. Wanted, busy, starting, stopping and pinned models are never stopped to make room.
2. A request for a ready model with a free slot is granted at once. All requests that wait for one model share its one
   start.
3. At most ``models_max`` models have a process, and together they take at most ``memory_budget`` bytes. A process that
   is told to stop counts until it is gone.
4. Room is made by stopping the ready, idle models that were used longest ago, no more than it takes, and none if that
   would not do.
5. Waiting requests go by priority, then by age. When a model that waits for room has been overtaken ``max_overtakes``
   times by requests for models in its way, it comes first, and one of those models is *drained*: it finishes what it
   has, and new requests for it wait. After as many again, another one is. So nobody is overtaken more often than
   ``max_overtakes`` times the places.
6. The cores are divided evenly among the models that are busy, and each is told when its share changes.
7. Queues are bounded, per model and in total: a request over the limit is refused.
8. What can never be served is refused at once: a model that is too large for the budget, or for what pinned models
   leave of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final, Protocol

from llamaherd.pool.errors import RETRY_AFTER, PoolError, QueueFull
from llamaherd.pool.threads import ThreadBudget

__all__ = ["Effects", "Limits", "Phase", "Scheduler"]

_MIB: Final = 1024 * 1024


class Effects(Protocol):
    """What the scheduler decides. Implementations take note and return; they do not call back into the scheduler."""

    def start(self, model: str) -> None:
        """Start a worker for the model. Answered by ``ready`` or ``exited``."""
        ...

    def wake(self, model: str) -> None:
        """Have the model's sleeping worker load it again. Answered by ``ready`` or ``exited``."""
        ...

    def stop(self, model: str) -> None:
        """Stop the model's worker. Answered by ``exited``."""
        ...

    def grant(self, ticket: int) -> None:
        """Send the request to its model's worker. Answered by ``finish``, if it holds the model."""
        ...

    def reject(self, ticket: int, error: PoolError) -> None:
        """End a request that was never granted."""
        ...

    def threads(self, model: str, n: int) -> None:
        """Tell the model's worker how many threads to compute with."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The numbers in the rules.

    Attributes:
        models_max: Most models with a process; 0 means no limit.
        memory_budget: Most bytes that all processes together may take; 0 means no limit.
        max_overtakes: See rule 5; at least 1.
        cores: Cores to divide among the models that are busy; 0 leaves the threads alone.
        queue_max: Most requests that wait, in total; 0 means no limit.
        queue_max_per_model: Most requests that wait for one model; 0 means no limit.
    """

    models_max: int = 4
    memory_budget: int = 0
    max_overtakes: int = 16
    cores: int = 0
    queue_max: int = 0
    queue_max_per_model: int = 0


class Phase(Enum):
    """What the scheduler knows of a model's process."""

    ABSENT = auto()
    STARTING = auto()
    READY = auto()
    ASLEEP = auto()
    STOPPING = auto()


@dataclass(frozen=True, slots=True)
class Room:
    """What processes take: places, and bytes of memory as far as they are known."""

    places: int = 0
    memory: int = 0

    def __add__(self, other: "Room") -> "Room":
        return Room(self.places + other.places, self.memory + other.memory)

    def __sub__(self, other: "Room") -> "Room":
        return Room(self.places - other.places, self.memory - other.memory)


@dataclass(slots=True)
class _Waiting:
    ticket: int
    model: "_Model"
    priority: int
    holds: bool


@dataclass(slots=True)
class _Model:
    name: str
    slots: int
    pinned: bool
    phase: Phase = Phase.ABSENT
    in_flight: int = 0
    last_used: int = 0
    overtaken: int = 0
    drained_for: "_Model | None" = None
    room: Room = Room(places=1)
    #: priority -> tickets in the order of their arrival; no empty ones are kept.
    queues: dict[int, dict[int, _Waiting]] = field(default_factory=dict[int, dict[int, _Waiting]])
    waiting: int = 0

    @property
    def has_slot(self) -> bool:
        return not self.slots or self.in_flight < self.slots

    @property
    def head(self) -> _Waiting:
        return next(iter(self.queues[max(self.queues)].values()))

    def put(self, waiting: _Waiting) -> None:
        self.queues.setdefault(waiting.priority, {})[waiting.ticket] = waiting
        self.waiting += 1

    def remove(self, waiting: _Waiting) -> None:
        queue = self.queues[waiting.priority]
        del queue[waiting.ticket]
        if not queue:
            del self.queues[waiting.priority]
        self.waiting -= 1


class Scheduler:
    """See the module's text."""

    def __init__(self, effects: Effects, limits: Limits | None = None) -> None:
        self._effects: Final = effects
        self._limits: Final = limits or Limits()
        self._models: dict[str, _Model] = {}
        self._waiting: dict[int, _Waiting] = {}
        self._granted: dict[int, _Model] = {}
        #: Models that someone waits for, and models that are busy: each event looks at these and not at all models.
        self._wanted: dict[str, _Model] = {}
        self._busy: dict[str, None] = {}
        #: Taken by all processes, and by those of them that are told to stop.
        self._used = Room()
        self._leaving = Room()
        self._clock = 0
        self._budget = ThreadBudget(self._limits.cores)

    def __repr__(self) -> str:
        return (
            f"<Scheduler [Models: {self._used.places} of {self._limits.models_max or 'any'} running, "
            f"{len(self._busy)} busy"
            f" | Requests: {len(self._granted)} granted, {len(self._waiting)} waiting]>"
        )

    # --- what may be read ---

    def phase(self, model: str) -> Phase:
        """Return what is known of the model's process."""
        return self._models[model].phase

    def in_flight(self, model: str) -> int:
        """Return how many requests are granted to the model and not finished."""
        return self._models[model].in_flight

    def queued(self, model: str) -> int:
        """Return how many requests wait for the model."""
        return self._models[model].waiting

    def queue(self, model: str) -> list[tuple[int, int]]:
        """Return ticket and priority of each request that waits for the model, in the order of their turns."""
        queues = self._models[model].queues
        return [(ticket, priority) for priority in sorted(queues, reverse=True) for ticket in queues[priority]]

    @property
    def busy(self) -> bool:
        """Whether any request is granted and not finished."""
        return bool(self._granted)

    def memory(self, model: str) -> int:
        """Return the bytes that the model takes, or is expected to take; 0 where nothing is known."""
        return self._models[model].room.memory

    # --- events ---

    def add(self, model: str, *, slots: int = 0, pinned: bool = False) -> None:
        """A model exists from now on. Raises ValueError if it did before.

        Args:
            slots: Most requests granted at one time; 0 means no limit.
            pinned: Never stopped to make room.
        """
        if model in self._models:
            raise ValueError(f"model {model!r} exists already")
        self._models[model] = _Model(model, slots, pinned)

    def resize(self, model: str, memory: int, *, measured: bool = False) -> None:
        """The model takes so many bytes: an estimate before its first start, a measurement after it.

        A model that was loaded fits, whatever was measured: it counts for no more than the whole budget.
        """
        entry = self._models[model]
        if measured and self._limits.memory_budget:
            memory = min(memory, self._limits.memory_budget)
        self._count(entry, -1)
        entry.room = Room(places=1, memory=memory)
        self._count(entry, +1)
        self._decide()

    def request(self, ticket: int, model: str, *, priority: int = 0, holds: bool = True) -> None:
        """Someone wants the model. Answered by ``grant`` or ``reject``, now or later. Raises KeyError for an unknown
        one.

        A request that does not ``hold`` only wants the model ready: its grant is its end.
        """
        entry = self._models[model]
        ready = entry.phase is Phase.READY and entry.drained_for is None and not entry.waiting
        refusal = None if ready and (entry.has_slot or not holds) else self._refusal(entry)
        if refusal is not None:
            self._effects.reject(ticket, refusal)
            return
        waiting = self._waiting[ticket] = _Waiting(ticket, entry, priority, holds)
        entry.put(waiting)
        self._wanted[model] = entry
        self._decide()

    def cancel(self, ticket: int) -> bool:
        """The caller of a waiting request has left. Returns False, and does nothing, if it is not waiting (any
        more).
        """
        if self._take_waiting(ticket) is None:
            return False
        self._decide()
        return True

    def finish(self, ticket: int) -> None:
        """A granted request has ended, however. Unknown tickets are ignored: its worker's end may have come first."""
        model = self._granted.pop(ticket, None)
        if model is not None:
            model.in_flight -= 1
            if not model.in_flight:
                del self._busy[model.name]
            self._touch(model)
            self._decide()

    def ready(self, model: str) -> None:
        """The model's worker takes requests."""
        entry = self._models[model]
        if entry.phase is Phase.STARTING:
            entry.phase = Phase.READY
            self._touch(entry)
            self._decide()

    def asleep(self, model: str) -> bool:
        """The model's worker was told to sleep; the next request wakes it. Returns False, and does nothing, if it is
        in use.
        """
        entry = self._models[model]
        if entry.phase is not Phase.READY or entry.in_flight or entry.waiting:
            return False
        entry.phase = Phase.ASLEEP
        return True

    def exited(self, model: str, error: PoolError | None = None) -> None:
        """The model's process is gone. Granted requests end with it; with an ``error``, those that wait for it end
        too.
        """
        entry = self._models[model]
        self._set_phase(entry, Phase.ABSENT)
        entry.drained_for = None
        if entry.in_flight:
            for ticket in [ticket for ticket, holder in self._granted.items() if holder is entry]:
                del self._granted[ticket]
            entry.in_flight = 0
            del self._busy[model]
        self._budget.forget(model)
        if error is not None:
            self._reject_waiting(entry, error)
        self._decide()

    def unload(self, model: str, error: PoolError) -> bool:
        """Someone wants the model stopped, busy or not: requests that wait for it end with ``error``.

        Returns False if it is not running. What was granted is the caller's to end.
        """
        entry = self._models[model]
        if entry.phase in (Phase.ABSENT, Phase.STOPPING):
            return False
        self._reject_waiting(entry, error)
        self._stop(entry)
        self._decide()
        return True

    # --- the decision ---

    def _decide(self) -> None:
        self._release_drains()
        self._grant_ready()
        if self._waiting:
            self._make_way()
        if self._limits.cores:
            for name, n in self._budget.update(self._busy).items():
                self._effects.threads(name, n)

    def _make_way(self) -> None:
        """Wake what sleeps, and start what is absent, as far as there is room or room can be made."""
        for model in [model for model in self._wanted.values() if model.phase is Phase.ASLEEP]:
            model.phase = Phase.STARTING
            self._effects.wake(model.name)
        promised = Room()
        for model in self._absent_in_turn():
            need = promised + model.room
            refusal = self._hopeless(model)
            if refusal is not None:
                self._reject_waiting(model, refusal)
            elif self._fits(self._used + need):
                self._start(model)
            elif self._fits(self._used - self._leaving + need) or self._make_room(need):
                promised = need  # its room comes with the exits of what was stopped
            elif model.overtaken >= self._limits.max_overtakes:
                self._drain_for(model)
                promised = need  # what the drained models free is not for those behind

    def _grant_ready(self) -> None:
        """Grant what waits for ready models with free slots, and count whom that overtakes."""
        passed = [model for model in self._wanted.values() if model.phase is Phase.ABSENT]
        for model in list(self._wanted.values()):
            while model.waiting and model.phase is Phase.READY and model.drained_for is None:
                head = model.head
                if head.holds and not model.has_slot:
                    break
                self._grant(head)
                if not model.pinned:
                    for other in passed:
                        other.overtaken += 1

    def _grant(self, waiting: _Waiting) -> None:
        model = waiting.model
        self._take_waiting(waiting.ticket)
        self._touch(model)
        model.overtaken = 0
        if waiting.holds:
            self._granted[waiting.ticket] = model
            model.in_flight += 1
            self._busy.setdefault(model.name)
        self._effects.grant(waiting.ticket)

    def _absent_in_turn(self) -> Iterator[_Model]:
        """Yield the models that are wanted and have no process, in the order in which they get room."""
        absent = [model for model in self._wanted.values() if model.phase is Phase.ABSENT]
        yield from sorted(absent, key=self._turn) if len(absent) > 1 else absent

    def _turn(self, model: _Model) -> tuple[bool, int, int]:
        head = model.head
        return model.overtaken < self._limits.max_overtakes, -head.priority, head.ticket

    def _fits(self, room: Room) -> bool:
        limits = self._limits
        places = not limits.models_max or room.places <= limits.models_max
        return places and (not limits.memory_budget or room.memory <= limits.memory_budget)

    def _start(self, model: _Model) -> None:
        self._set_phase(model, Phase.STARTING)
        model.overtaken = 0
        self._touch(model)
        self._effects.start(model.name)

    def _make_room(self, need: Room) -> bool:
        """Stop the idle models that were used longest ago, as many as it takes; none if all of them do not do."""
        idle = [
            model
            for model in self._models.values()
            if model.phase in (Phase.READY, Phase.ASLEEP)
            and not model.in_flight
            and not model.pinned
            and (not model.waiting or model.drained_for is not None)
        ]
        idle.sort(key=lambda model: (model.drained_for is None, model.last_used))
        left = self._used - self._leaving + need
        for count, model in enumerate(idle, start=1):
            left -= model.room
            if self._fits(left):
                for victim in idle[:count]:
                    self._stop(victim)
                return True
        return False

    def _stop(self, model: _Model) -> None:
        self._set_phase(model, Phase.STOPPING)
        self._effects.stop(model.name)

    def _hopeless(self, model: _Model) -> QueueFull | None:
        """Return why a model can never start: it is too large, or what is pinned leaves no room; None if it can."""
        if not self._fits(model.room):
            return _too_large(model.name, model.room.memory, self._limits.memory_budget)
        held = model.room
        for other in self._models.values():
            if other.pinned and other.phase not in (Phase.ABSENT, Phase.STOPPING):
                held += other.room
        return None if self._fits(held) else _no_room(model.name)

    # --- draining ---

    def _drain_for(self, wanted: _Model) -> None:
        ready = [model for model in self._models.values() if model.phase is Phase.READY and not model.pinned]
        drained = sum(model.drained_for is wanted for model in ready)
        candidates = sorted(
            (model for model in ready if model.drained_for is None),
            key=lambda model: (model.in_flight, model.last_used),
        )
        for model in candidates[: wanted.overtaken // self._limits.max_overtakes - drained]:
            model.drained_for = wanted

    def _release_drains(self) -> None:
        """Undo the draining of models for those that are not waited for any more, or have started."""
        for model in self._models.values():
            wanted = model.drained_for
            if wanted is not None and (not wanted.waiting or wanted.phase is not Phase.ABSENT):
                model.drained_for = None

    # --- bookkeeping ---

    def _refusal(self, model: _Model) -> QueueFull | None:
        limits = self._limits
        if limits.queue_max_per_model and model.waiting >= limits.queue_max_per_model:
            text = f"{model.waiting} requests wait for model {model.name!r} already, and the limit is"
            return QueueFull(
                f"{text} {limits.queue_max_per_model}", code="queue_full", retry=True, retry_after=RETRY_AFTER
            )
        if limits.queue_max and len(self._waiting) >= limits.queue_max:
            text = f"{len(self._waiting)} requests wait already, and the limit is {limits.queue_max}"
            return QueueFull(text, code="queue_full", retry=True, retry_after=RETRY_AFTER)
        return None

    def _take_waiting(self, ticket: int) -> _Waiting | None:
        waiting = self._waiting.pop(ticket, None)
        if waiting is not None:
            model = waiting.model
            model.remove(waiting)
            if not model.waiting:
                model.overtaken = 0
                del self._wanted[model.name]
        return waiting

    def _reject_waiting(self, model: _Model, error: PoolError) -> None:
        for ticket in [ticket for queue in model.queues.values() for ticket in queue]:
            self._take_waiting(ticket)
            self._effects.reject(ticket, error)

    def _set_phase(self, model: _Model, phase: Phase) -> None:
        self._count(model, -1)
        model.phase = phase
        self._count(model, +1)

    def _count(self, model: _Model, sign: int) -> None:
        room = Room(sign * model.room.places, sign * model.room.memory)
        if model.phase is not Phase.ABSENT:
            self._used += room
        if model.phase is Phase.STOPPING:
            self._leaving += room

    def _touch(self, model: _Model) -> None:
        self._clock += 1
        model.last_used = self._clock


def _no_room(model: str) -> QueueFull:
    return QueueFull(f"model {model!r} cannot be loaded: what pinned models hold leaves no room for it", code="no_room")


def _too_large(model: str, memory: int, budget: int) -> QueueFull:
    figures = f"it needs about {memory // _MIB} MiB, and the memory budget is {budget // _MIB} MiB"
    return QueueFull(f"model {model!r} cannot be loaded: {figures}", code="too_large")
