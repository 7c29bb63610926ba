"""Which model runs, and which request goes to it: the decision, without doing any of it.

Events come in as method calls; what follows from them goes out through :class:`Effects`, which must only take note and
return. There is no clock, no process and no I/O here, so every rule can be tested by itself.

The rules:

1. A request holds its model from the moment that it is accepted: a waiting request makes the model *wanted*, a granted
   one makes it *busy*. Wanted, busy, starting and stopping models are never stopped to make room.
2. A request for a model that is ready is granted at once. All requests that wait for one model share its one start.
3. At most ``models_max`` models have a process. A process that is told to stop counts until it is gone.
4. Room is made by stopping the ready, idle model that was used longest ago. One stop is begun per start that needs it.
5. A waiting request is overtaken at most ``max_overtakes`` times by requests for models that keep it from starting.
   Then one of those models is *drained*: new requests for it wait behind, it finishes what it has, and its room goes
   to the one that waited.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final, Protocol

from llamaherd.pool.errors import PoolError
from llamaherd.pool.threads import ThreadBudget

__all__ = ["Effects", "Phase", "Scheduler"]

DEFAULT_MAX_OVERTAKES: Final = 16


class Effects(Protocol):
    """What the scheduler decides. Implementations take note and return; they do not call back into the scheduler."""

    def start(self, model: str) -> None:
        """Start a worker for the model. Answered by ``ready`` or ``exited``."""
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


class Phase(Enum):
    """What the scheduler knows of a model's process."""

    ABSENT = auto()
    STARTING = auto()
    READY = auto()
    STOPPING = auto()


@dataclass(slots=True)
class _Model:
    name: str
    phase: Phase = Phase.ABSENT
    in_flight: int = 0
    waiting: int = 0
    last_used: int = 0
    drained_for: int | None = None


@dataclass(slots=True)
class _Waiting:
    ticket: int
    model: _Model
    holds: bool
    overtaken: int = 0


@dataclass(slots=True)
class Scheduler:
    """See the module's text.

    Args:
        effects: Where decisions go.
        models_max: Most models with a process; 0 means no limit.
        max_overtakes: See rule 5.
        cores: Cores to divide among the models that are busy (rule 6); 0 leaves the threads alone.
    """

    effects: Effects
    models_max: int = 4
    max_overtakes: int = DEFAULT_MAX_OVERTAKES
    cores: int = 0
    _models: dict[str, _Model] = field(default_factory=dict[str, _Model])
    _waiting: dict[int, _Waiting] = field(default_factory=dict[int, _Waiting])
    _granted: dict[int, _Model] = field(default_factory=dict[int, _Model])
    _busy: dict[str, None] = field(default_factory=dict[str, None])
    _budget: ThreadBudget = field(init=False)
    _clock: int = 0

    def __post_init__(self) -> None:
        self._budget = ThreadBudget(self.cores)

    def __repr__(self) -> str:
        running = [model for model in self._models.values() if model.phase is not Phase.ABSENT]
        busy = sum(1 for model in running if model.in_flight)
        return (
            f"<Scheduler [Models: {len(running)} of {self.models_max or 'any'} running, {busy} busy | "
            f"Requests: {len(self._granted)} granted, {len(self._waiting)} waiting]>"
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

    # --- events ---

    def add(self, model: str) -> None:
        """A model exists from now on. Raises ValueError if it did before."""
        if model in self._models:
            raise ValueError(f"model {model!r} exists already")
        self._models[model] = _Model(model)

    def request(self, ticket: int, model: str, *, holds: bool = True) -> None:
        """Someone wants the model. Answered by ``grant`` or ``reject``, now or later. Raises KeyError for an unknown
        model.

        A request that does not ``hold`` only wants the model ready: its grant is its end.
        """
        entry = self._models[model]
        self._waiting[ticket] = _Waiting(ticket, entry, holds)
        entry.waiting += 1
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

    def exited(self, model: str, error: PoolError | None = None) -> None:
        """The model's process is gone. Granted requests end with it; with an ``error``, requests that wait for it end
        too.
        """
        entry = self._models[model]
        entry.phase = Phase.ABSENT
        entry.drained_for = None
        for ticket in [ticket for ticket, holder in self._granted.items() if holder is entry]:
            del self._granted[ticket]
        entry.in_flight = 0
        self._busy.pop(model, None)
        self._budget.forget(model)
        if error is not None:
            self._reject_waiting(entry, error)
        self._decide()

    def unload(self, model: str, error: PoolError) -> bool:
        """Someone wants the model stopped, busy or not: requests that wait for it end with ``error``.

        Returns False if it is not running. What was granted is the caller's to end.
        """
        entry = self._models[model]
        if entry.phase not in (Phase.STARTING, Phase.READY):
            return False
        self._reject_waiting(entry, error)
        self._stop(entry)
        self._decide()
        return True

    # --- the decision ---

    def _decide(self) -> None:
        self._release_drains()
        self._grant_ready()
        room = self._room()
        starved: list[_Waiting] = []
        for waiting in self._first_of_each_absent_model():
            if room > 0:
                room -= 1
                self._start_or_wait(waiting.model)
            elif self._make_room():
                pass  # its room comes with the exit of what was stopped
            else:
                starved.append(waiting)
        for waiting in starved:
            if waiting.overtaken >= self.max_overtakes:
                self._drain_for(waiting)
        if self.cores:
            for model, n in self._budget.update(self._busy).items():
                self.effects.threads(model, n)

    def _grant_ready(self) -> None:
        """Grant what waits for ready models, and count whom that overtakes."""
        passed: list[_Waiting] = []
        for waiting in list(self._waiting.values()):
            model = waiting.model
            if model.phase is not Phase.READY or model.drained_for is not None:
                if model.phase is Phase.ABSENT:
                    passed.append(waiting)
                continue
            self._take_waiting(waiting.ticket)
            self._touch(model)
            if waiting.holds:
                self._granted[waiting.ticket] = model
                model.in_flight += 1
                self._busy.setdefault(model.name)
            for other in passed:
                other.overtaken += 1
            self.effects.grant(waiting.ticket)

    def _first_of_each_absent_model(self) -> Iterator[_Waiting]:
        seen: set[str] = set()
        for waiting in list(self._waiting.values()):
            if waiting.model.phase is Phase.ABSENT and waiting.model.name not in seen:
                seen.add(waiting.model.name)
                yield waiting

    def _room(self) -> int:
        """Free places, counting those that stops under way will free; negative only if the limit was lowered."""
        if self.models_max == 0:
            return len(self._models)
        phases = [model.phase for model in self._models.values()]
        return self.models_max - sum(phase in (Phase.STARTING, Phase.READY) for phase in phases)

    def _start_or_wait(self, model: _Model) -> None:
        """Start now if a place is free, or let the model wait for the stop whose place it was given."""
        if self.models_max:
            used = sum(other.phase is not Phase.ABSENT for other in self._models.values())
            if used >= self.models_max:
                return
        model.phase = Phase.STARTING
        self._touch(model)
        self.effects.start(model.name)

    def _make_room(self) -> bool:
        idle = [
            model
            for model in self._models.values()
            if model.phase is Phase.READY
            and not model.in_flight
            and (not model.waiting or model.drained_for is not None)
        ]
        if not idle:
            return False
        self._stop(min(idle, key=lambda model: (model.drained_for is None, model.last_used)))
        return True

    def _stop(self, model: _Model) -> None:
        model.phase = Phase.STOPPING
        self.effects.stop(model.name)

    # --- draining ---

    def _drain_for(self, waiting: _Waiting) -> None:
        ready = [model for model in self._models.values() if model.phase is Phase.READY]
        if any(model.drained_for == waiting.ticket for model in ready):
            return
        candidates = [model for model in ready if model.drained_for is None]
        if candidates:
            chosen = min(candidates, key=lambda model: (model.in_flight, model.last_used))
            chosen.drained_for = waiting.ticket

    def _release_drains(self) -> None:
        """Undo the draining of models for requests that have left or whose model has started."""
        for model in self._models.values():
            if model.drained_for is not None and model.phase is Phase.READY:
                waiting = self._waiting.get(model.drained_for)
                if waiting is None or waiting.model.phase is not Phase.ABSENT:
                    model.drained_for = None

    # --- bookkeeping ---

    def _take_waiting(self, ticket: int) -> _Waiting | None:
        waiting = self._waiting.pop(ticket, None)
        if waiting is not None:
            waiting.model.waiting -= 1
        return waiting

    def _reject_waiting(self, model: _Model, error: PoolError) -> None:
        for ticket in [ticket for ticket, waiting in self._waiting.items() if waiting.model is model]:
            self._take_waiting(ticket)
            self.effects.reject(ticket, error)

    def _touch(self, model: _Model) -> None:
        self._clock += 1
        model.last_used = self._clock
