"""Which model runs, and which request goes to it: the decision, without doing any of it.

Events come in as method calls; what follows from them goes out through :class:`Effects`, which must only take note and
return. There is no clock, no process and no I/O here, so every rule can be tested by itself.

A model has one process or several, its *instances*, numbered from 0 on. The rules:

1. A request holds its model from the moment that it is accepted: a waiting request makes the model *wanted*, a granted
   one makes its instance *busy*. Wanted, busy, starting, stopping and pinned ones are never stopped to make room.
2. A request for a model with a free slot is granted at once, to the instance that has least to do; one that has seen
   the beginning of its prompt is preferred as long as it has at most ``AFFINITY_SLACK`` more to do than that. All
   requests that wait for one model share its start.
3. At most ``models_max`` processes run, and together they take at most ``memory_budget`` bytes, and of each GPU at most
   its budget. A process that is told to stop counts until it is gone; where memory is counted it gives up its place at
   once and keeps its bytes, so that the next one can start beside it where both are known to fit.
4. Room is made by stopping the ready, idle instances that were used longest ago, no more than it takes, none whose end
   would not help, and none if that would not do. Those without which their model goes on go first.
5. Waiting requests go by priority, then by age. When a model that waits for room has been overtaken ``max_overtakes``
   times by requests for models in its way, it comes first, and an instance in its way is *drained*: it finishes what it
   has, and new requests for it wait. After as many again, another one is. So nobody is overtaken more often than
   ``max_overtakes`` times the places.
6. A further instance of a model starts when more requests wait than those that run or start have slots for, and only
   into room that is free and that nobody waits for: it stops nothing and drains nothing.
7. The cores are divided evenly among the instances that are busy, and each is told when its share changes.
8. Queues are bounded, per model and in total: a request over the limit is refused.
9. What can never be served is refused at once: a model that is too large for the budget, or for what pinned models
   leave of it.
10. A start that fails for want of memory stops the idle instance that was used longest ago and is tried once more.
11. An instance that *retires* (its model has changed) takes no new requests and is stopped when it has finished.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

from llamaherd.pool.effects import Effects
from llamaherd.pool.errors import PoolError
from llamaherd.pool.eviction import dispensable, drainable, hopeless
from llamaherd.pool.line import Line
from llamaherd.pool.room import Ledger, Limits, Room
from llamaherd.pool.roster import Instance, Key, Model, Phase, Waiting
from llamaherd.pool.threads import ThreadBudget

__all__ = ["Limits", "Phase", "Scheduler"]


class Scheduler:
    """See the module's text. Events and questions that name a replica mean the only one of a model by default."""

    def __init__(self, effects: Effects, limits: Limits | None = None) -> None:
        self._effects: Final = effects
        self._limits: Final = limits or Limits()
        self._models: dict[str, Model] = {}
        self._line: Final = Line(self._limits)
        self._ledger: Final = Ledger(self._limits)
        self._granted: dict[int, Instance] = {}
        #: What events look at instead of at all instances: those that are busy, that are drained, and that retire.
        self._busy: dict[Key, None] = {}
        self._drained: dict[Key, Instance] = {}
        self._retiring: dict[Key, Instance] = {}
        #: How often a model was stopped to make room for another.
        self.evictions: Final[Counter[str]] = Counter()
        self._clock = 0
        self._budget: ThreadBudget[Key] = ThreadBudget(self._limits.cores)

    def __repr__(self) -> str:
        return (
            f"<Scheduler [Models: {self._ledger.used.places} of {self._limits.models_max or 'any'} running, "
            f"{len(self._busy)} busy"
            f" | Requests: {len(self._granted)} granted, {len(self._line)} waiting]>"
        )

    # --- what may be read ---

    def phase(self, model: str, replica: int = 0) -> Phase:
        """Return what is known of a process."""
        return self._models[model].instances[replica].phase

    def in_flight(self, model: str, replica: int | None = None) -> int:
        """Return how many requests are granted to the model, or to one of its replicas, and not finished."""
        instances = self._models[model].instances
        return sum(one.in_flight for one in instances if replica is None or one.index == replica)

    def queued(self, model: str) -> int:
        """Return how many requests wait for the model."""
        return self._models[model].waiting

    def queue(self, model: str) -> list[tuple[int, int]]:
        """Return ticket and priority of each request that waits for the model, in the order of their turns."""
        return [(waiting.ticket, waiting.priority) for waiting in self._models[model].in_turn()]

    @property
    def busy(self) -> bool:
        """Whether any request is granted and not finished."""
        return bool(self._granted)

    def memory(self, model: str, replica: int | None = None) -> int:
        """Return the bytes that a replica takes; without its number what all that run take, or what the first one is
        expected to take if none runs. 0 where nothing is known.
        """
        entry = self._models[model]
        if replica is not None:
            instance = entry.instances[replica]
            return 0 if instance.phase is Phase.ABSENT else instance.room.total
        running = [one.room.total for one in entry.instances if one.phase is not Phase.ABSENT]
        return sum(running) if running else entry.next_room.total

    # --- events: models ---

    def add(self, model: str, *, slots: int = 0, replicas: int = 1, pinned: bool = False) -> None:
        """A model exists from now on. Raises ValueError if it did before.

        Args:
            slots: Most requests granted to one instance at a time; 0 means no limit.
            replicas: Most instances; one runs at least while there are requests.
            pinned: Never stopped to make room, except for instances beyond the first.
        """
        if model in self._models:
            raise ValueError(f"model {model!r} exists already")
        entry = self._models[model] = Model(model, slots, replicas, pinned)
        entry.resize(replicas)

    def change(self, model: str, *, slots: int, replicas: int, pinned: bool) -> None:
        """The model is to be run otherwise from now on, with its further instances in the way that :meth:`add` says.

        Instances that run go on; those beyond ``replicas`` retire.
        """
        entry = self._models[model]
        entry.slots, entry.pinned, entry.stunted = slots, pinned, False
        entry.resize(replicas)
        for instance in entry.instances[replicas:]:
            self._retire(instance)
        self._decide()

    def remove(self, model: str) -> None:
        """The model exists no more. Raises ValueError if it has a process or is waited for."""
        entry = self._models[model]
        if entry.waiting or any(instance.phase is not Phase.ABSENT for instance in entry.instances):
            raise ValueError(f"model {model!r} is in use")
        del self._models[model]

    def retire(self, model: str, replica: int = 0) -> None:
        """An instance is out of date: let it finish what it has, and stop it then. One that loads is stopped at once.

        No effect on one that does not run.
        """
        self._retire(self._models[model].instances[replica])
        self._decide()

    def retain(self, model: str, replica: int = 0) -> None:
        """An instance that retires is wanted again after all. No effect once it is told to stop."""
        instance = self._models[model].instances[replica]
        if instance.retiring and instance.phase is not Phase.STOPPING:
            instance.retiring = False
            del self._retiring[instance.key]
            self._decide()

    def resize(self, model: str, memory: int, gpus: Sequence[tuple[int, ...]] = ((),)) -> None:
        """A further instance of the model is expected to take so many bytes of this machine's memory and, for each of
        the model's placements, of each GPU.
        """
        self._models[model].rooms = [Room(1, memory, shares) for shares in gpus]
        self._decide()

    def measure(self, model: str, memory: int, replica: int = 0, gpus: tuple[int, ...] | None = None) -> None:
        """An instance takes so many bytes, of GPUs as many as were expected if nobody knows, and a further one of its
        kind is expected to take as many, unless this one is on its way out.

        What was loaded fits, whatever was measured: it counts for no more than the whole budget.
        """
        entry = self._models[model]
        instance = entry.instances[replica]
        room = self._limits.clamp(Room(1, memory, instance.room.gpus if gpus is None else gpus))
        self._count(instance, -1)
        instance.room = room
        self._count(instance, +1)
        if not instance.retiring and instance.phase is not Phase.STOPPING:
            entry.rooms[replica % len(entry.rooms)] = room  # one that is out of date says nothing of the next
        self._decide()

    # --- events: requests ---

    def request(
        self, ticket: int, model: str, *, priority: int = 0, holds: bool = True, prefix: tuple[int, ...] = ()
    ) -> None:
        """Someone wants the model. Answered by ``grant`` or ``reject``, now or later. Raises KeyError for an unknown
        one.

        A request that does not ``hold`` only wants the model ready: its grant is its end. ``prefix`` are the keys of
        its prompt, see :func:`~llamaherd.pool.affinity.prefix_keys`.
        """
        entry = self._models[model]
        waiting = Waiting(ticket, entry, priority, holds, prefix)
        if entry.waiting or entry.choose(waiting) is None:
            refusal = self._line.refusal(entry)
            if refusal is not None:
                self._effects.reject(ticket, refusal)
                return
        self._line.put(waiting)
        self._decide()

    def cancel(self, ticket: int) -> bool:
        """The caller of a waiting request has left. Returns False, and does nothing, if it is not waiting (any
        more).
        """
        if self._line.take(ticket) is None:
            return False
        self._decide()
        return True

    def finish(self, ticket: int) -> None:
        """A granted request has ended, however. Unknown tickets are ignored: its worker's end may have come first."""
        instance = self._granted.pop(ticket, None)
        if instance is not None:
            instance.in_flight -= 1
            if not instance.in_flight:
                del self._busy[instance.key]
            self._touch(instance)
            self._decide()

    # --- events: processes ---

    def ready(self, model: str, replica: int = 0) -> None:
        """A worker takes requests."""
        entry = self._models[model]
        instance = entry.instances[replica]
        if instance.phase is Phase.STARTING:
            instance.phase = Phase.READY
            entry.second_try, entry.victim = False, None
            self._touch(instance)
            self._decide()

    def asleep(self, model: str, replica: int = 0) -> bool:
        """A worker was told to sleep; the next request that needs it wakes it. Returns False, and does nothing, if it
        is in use.
        """
        entry = self._models[model]
        instance = entry.instances[replica]
        if instance.phase is not Phase.READY or instance.in_flight or entry.waiting:
            return False
        instance.phase = Phase.ASLEEP
        instance.prefixes.clear()
        return True

    def exited(
        self, model: str, error: PoolError | None = None, *, replica: int = 0, short_of_memory: bool = False
    ) -> bool:
        """A process is gone. Granted requests end with it; with an ``error``, those that wait for the model end too,
        unless another instance serves them.

        ``short_of_memory`` says that its load failed for that reason. Returns True if room was made and the start will
        be tried again, with everyone who waits for it.
        """
        entry = self._models[model]
        instance = entry.instances[replica]
        starting = instance.phase is Phase.STARTING
        self._set_phase(instance, Phase.ABSENT)
        self._release(instance)
        self._forget_granted(instance)
        instance.prefixes.clear()
        self._budget.forget(instance.key)
        self._retiring.pop(instance.key, None)
        instance.retiring = False
        entry.trim()
        again = starting and short_of_memory and self._make_second_try(entry)
        if error is not None and not again:
            entry.second_try, entry.victim = False, None
            if entry.live:
                entry.stunted = True
            else:
                self._reject_waiting(entry, error)
        self._decide()
        return again

    def unload(self, model: str, error: PoolError) -> bool:
        """Someone wants the model stopped, busy or not: requests that wait for it end with ``error``.

        Returns False if it is not running. What was granted is the caller's to end.
        """
        entry = self._models[model]
        running = [one for one in entry.instances if one.phase not in (Phase.ABSENT, Phase.STOPPING)]
        if not running:
            return False
        self._reject_waiting(entry, error)
        entry.stunted = False
        for instance in running:
            self._stop(instance)
        self._decide()
        return True

    def dismiss(self, model: str, replica: int) -> None:
        """Stop one idle instance; no effect on one that is in use."""
        entry = self._models[model]
        instance = entry.instances[replica]
        if instance.phase in (Phase.READY, Phase.ASLEEP) and not instance.in_flight and not entry.waiting:
            self._stop(instance)
            self._decide()

    def let_grow(self, model: str) -> None:
        """A further replica may be tried again after one that failed."""
        self._models[model].stunted = False
        self._decide()

    # --- the decision ---

    def _decide(self) -> None:
        if self._drained:
            self._release_drains()
        for instance in [one for one in self._retiring.values() if not one.in_flight]:
            self._stop(instance)
        self._grant_ready()
        if len(self._line):
            self._wake_sleepers()
            self._make_way()
            if self._drained:
                self._release_drains()
                self._grant_ready()
            self._grow()
        if self._limits.cores:
            for (name, replica), n in self._budget.update(self._busy).items():
                self._effects.threads(name, replica, n)

    def _grant_ready(self) -> None:
        """Grant what waits where there are free slots, and count whom that overtakes."""
        hungry = self._line.hungry
        for model in list(self._line.wanted.values()):
            while model.waiting:
                head = model.head
                instance = model.choose(head)
                if instance is None:
                    break
                self._grant(head, instance)
                if not model.pinned:
                    for other in hungry:
                        other.overtaken += 1

    def _grant(self, waiting: Waiting, instance: Instance) -> None:
        self._line.take(waiting.ticket)
        self._touch(instance)
        waiting.model.overtaken = 0
        if waiting.holds:
            self._granted[waiting.ticket] = instance
            instance.in_flight += 1
            self._busy.setdefault(instance.key)
            if waiting.model.replicas > 1:
                instance.prefixes.note(waiting.prefix)
        self._effects.grant(waiting.ticket, instance.index)

    def _wake_sleepers(self) -> None:
        """Wake as many of the sleeping instances as those who wait need."""
        for model in self._line.wanted.values():
            for instance in model.instances:
                if instance.phase is Phase.ASLEEP and not instance.retiring and model.lacks_slots:
                    instance.phase = Phase.STARTING
                    self._effects.wake(model.name, instance.index)

    def _make_way(self) -> None:
        """Start what is needed, as far as there is room or room can be made."""
        promised = Room()
        waits: Model | None = None
        for model in self._hungry_in_turn():
            need = promised + self._ledger.need(model.next_room)
            refusal = hopeless(model, self._models.values(), self._limits)
            if refusal is not None:
                self._reject_waiting(model, refusal)
                continue
            if self._ledger.fits(need):
                self._start(model)
                continue
            waits = waits or model
            if self._ledger.will_fit(need) or self._make_room(need):
                promised = need  # its room comes with the exits of what was stopped
            elif model.overtaken >= self._limits.max_overtakes:
                self._drain_for(model)
                promised = need  # what the drained models free is not for those behind
        if waits is not None:
            self._effects.prepare(waits.name)

    def _grow(self) -> None:
        """Start further replicas where too many wait, as far as there is room to spare. Rule 6."""
        if self._line.hungry:
            return
        for model in list(self._line.wanted.values()):
            while (
                model.replicas > 1
                and not model.stunted
                and model.lacks_slots
                and model.startable is not None
                and self._ledger.fits(self._ledger.need(model.next_room))
            ):
                self._start(model)

    def _hungry_in_turn(self) -> Iterator[Model]:
        """Yield the models that wait for a process, in the order in which they get room."""
        hungry = self._line.hungry
        yield from sorted(hungry, key=self._turn) if len(hungry) > 1 else hungry

    def _turn(self, model: Model) -> tuple[bool, int, int]:
        head = model.head
        return model.overtaken < self._limits.max_overtakes, -head.priority, head.ticket

    def _start(self, model: Model) -> None:
        instance = model.startable
        assert instance is not None
        instance.room = model.next_room
        self._set_phase(instance, Phase.STARTING)
        model.overtaken = 0
        self._touch(instance)
        self._effects.start(model.name, instance.index)

    # --- making room ---

    def _make_room(self, need: Room) -> bool:
        """Stop idle instances, as many as it takes; none if all of them do not do. Rule 4."""
        idle = dispensable(self._models.values())
        left = self._ledger.after_exits(need)
        for count, instance in enumerate(idle, start=1):
            left -= instance.room
            if self._limits.allow(left):
                for victim in self._needed(idle[:count], left):
                    self._evict(victim)
                return True
        return False

    def _needed(self, victims: list[Instance], left: Room) -> list[Instance]:
        """Return the victims without those whose end would not help, such as those on another GPU."""
        needed = list(victims)
        for victim in reversed(victims):
            if self._limits.allow(left + victim.room):
                left += victim.room
                needed.remove(victim)
        return needed

    def _stop(self, instance: Instance) -> None:
        self._release(instance)
        self._retiring.pop(instance.key, None)
        self._set_phase(instance, Phase.STOPPING)
        self._effects.stop(*instance.key)

    def _evict(self, instance: Instance) -> None:
        self.evictions[instance.key[0]] += 1
        self._stop(instance)

    def _retire(self, instance: Instance) -> None:
        if instance.phase is Phase.STARTING:
            self._stop(instance)
        elif instance.phase in (Phase.READY, Phase.ASLEEP):
            self._release(instance)
            instance.retiring = True
            self._retiring[instance.key] = instance

    def _make_second_try(self, model: Model) -> bool:
        """Stop something idle for a model whose load found too little memory. Rule 10."""
        if not model.waiting or model.live or model.second_try:
            return False
        idle = dispensable(self._models.values())
        if not idle:
            return False
        # One on the same GPU, if any is known to be.
        victim = next((one for one in idle if one.room.meets(model.next_room)), idle[0])
        self._evict(victim)
        model.second_try, model.victim = True, victim
        return True

    # --- draining ---

    def _drain_for(self, wanted: Model) -> None:
        for instance in drainable(self._models.values(), wanted, self._limits.max_overtakes):
            instance.drained_for = wanted
            self._drained[instance.key] = instance

    def _release_drains(self) -> None:
        """Undo the draining of instances for models that are not waited for any more, or have started."""
        for instance in list(self._drained.values()):
            if instance.drained_for is None or not instance.drained_for.hungry:
                self._release(instance)

    def _release(self, instance: Instance) -> None:
        instance.drained_for = None
        self._drained.pop(instance.key, None)

    # --- bookkeeping ---

    def _reject_waiting(self, model: Model, error: PoolError) -> None:
        for waiting in list(model.in_turn()):
            self._line.take(waiting.ticket)
            self._effects.reject(waiting.ticket, error)

    def _forget_granted(self, instance: Instance) -> None:
        if instance.in_flight:
            for ticket in [ticket for ticket, holder in self._granted.items() if holder is instance]:
                del self._granted[ticket]
            instance.in_flight = 0
            del self._busy[instance.key]

    def _set_phase(self, instance: Instance, phase: Phase) -> None:
        self._count(instance, -1)
        instance.phase = phase
        self._count(instance, +1)

    def _count(self, instance: Instance, sign: int) -> None:
        if instance.phase is not Phase.ABSENT:
            self._ledger.count(instance.room, stopping=instance.phase is Phase.STOPPING, sign=sign)

    def _touch(self, instance: Instance) -> None:
        self._clock += 1
        instance.last_used = self._clock
