"""Which model runs, and which request goes to it: the decision, without doing any of it.

Events come in as method calls; what follows from them goes out through :class:`Effects`, which must only take note and
return. There is no clock, no process and no I/O here, so every rule can be tested by itself.

A model has one process or several, its *instances*, numbered from 0 on. The rules:

1. A request holds its model from the moment that it is accepted: a waiting request makes the model *wanted*, a granted
   one makes its instance *busy*. Wanted, busy, starting, stopping and pinned ones are never stopped to make room, nor
   is one that is *held* for something beside requests.
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
10. A start that fails for want of memory stops the spare that has loaded something ahead, or else the idle instance
    that was used longest ago, and is tried once more.
11. An instance that *retires* (its model has changed) takes no new requests and is stopped when it has finished.
12. A request whose process died may go back to the line: to its old place, whatever the limits say by now.
13. A spare process may load a model ahead that is likely wanted next: into room that is free and that nobody waits for,
    where memory is counted. It takes no place, only bytes, and these are those of the next start that the spare can
    become; for one that it cannot, the spare goes before anything else.

What an event costs does not grow with the models: it looks at the model that it concerns, and at those that wait for
room only when there may be more of it.
"""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Final

from llamaherd.pool.effects import Effects
from llamaherd.pool.errors import PoolError, QueueFull
from llamaherd.pool.eviction import dispensable, drainable, hopeless, victims
from llamaherd.pool.foresight import Foresight
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
        self._granted: dict[int, Waiting] = {}
        self._pinned: dict[str, Model] = {}
        #: Instances that nobody uses, in the order of their last use, and those that are drained.
        self._idle: dict[Key, Instance] = {}
        self._drained: dict[Key, Instance] = {}
        #: Models whose second start waits for the end of a spare.
        self._awaits_spare: list[Model] = []
        #: What an event leaves to be looked at: models, and whether there may be more room, or something to make some.
        self._stirred: dict[str, Model] = {}
        self._room_changed = False
        #: Granted, and not told yet.
        self._grants: list[tuple[int, int]] = []
        #: How often a model was stopped to make room for another.
        self.evictions: Final[Counter[str]] = Counter()
        self._foresight: Final = Foresight()
        self._clock = 0
        self._budget: ThreadBudget[Key] = ThreadBudget(self._limits.cores)

    def __repr__(self) -> str:
        return (
            f"<Scheduler [Models: {self._ledger.used.places} of {self._limits.models_max or 'any'} running, "
            f"{len(self._budget)} busy"
            f" | Requests: {len(self._granted)} granted, {len(self._line)} waiting]>"
        )

    # --- what may be read ---

    def phase(self, model: str, replica: int = 0) -> Phase:
        """Return what is known of a process."""
        return self._models[model].instances[replica].phase

    def in_flight(self, model: str, replica: int | None = None) -> int:
        """Return how many requests are granted to the model, or to one of its replicas, and not finished."""
        instances = self._models[model].instances
        if replica is None:
            return sum(len(one.granted) for one in instances)
        return len(instances[replica].granted) if replica < len(instances) else 0

    def unused(self, model: str, replica: int) -> bool:
        """Whether nobody waits for a model, and one of its instances has neither requests nor anything else to do."""
        entry = self._models[model]
        if entry.waiting:
            return False
        if replica >= len(entry.instances):
            return True
        instance = entry.instances[replica]
        return not instance.granted and not instance.errands

    def queued(self, model: str) -> int:
        """Return how many requests wait for the model."""
        return self._models[model].waiting

    def refusal(self, model: str, more: int = 0, more_in_all: int = 0) -> QueueFull | None:
        """Return why nobody more may wait for the model, where so many wait beside those that are known; None if they
        may.
        """
        return self._line.refusal(self._models[model], more, more_in_all)

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

    def add(
        self,
        model: str,
        *,
        slots: int = 0,
        replicas: int = 1,
        pinned: bool = False,
        queue_max: int | None = None,
        placed: bool = False,
    ) -> None:
        """A model exists from now on. Raises ValueError if it did before.

        Args:
            slots: Most requests granted to one instance at a time; 0 means no limit.
            replicas: Most instances; one runs at least while there are requests.
            pinned: Never stopped to make room, except for instances beyond the first.
            queue_max: Most requests that wait for it; 0 means no limit, None that of all models.
            placed: Its processes run where they are told to, so a spare cannot become one.
        """
        if model in self._models:
            raise ValueError(f"model {model!r} exists already")
        entry = self._models[model] = Model(model, slots, replicas, pinned, queue_max, placed)
        entry.resize(replicas)
        if pinned:
            self._pinned[model] = entry

    def change(
        self,
        model: str,
        *,
        slots: int,
        replicas: int,
        pinned: bool,
        queue_max: int | None = None,
        placed: bool = False,
    ) -> None:
        """The model is to be run otherwise from now on, with its further instances in the way that :meth:`add` says.

        Instances that run go on; those beyond ``replicas`` retire.
        """
        entry = self._models[model]
        entry.slots, entry.pinned, entry.queue_max, entry.stunted = slots, pinned, queue_max, False
        entry.placed = placed
        entry.resize(replicas)
        if pinned:
            self._pinned[model] = entry
        else:
            self._pinned.pop(model, None)
        for instance in entry.instances[replicas:]:
            self._retire(instance)
        self._stir(entry)
        self._room_changed = True
        self._decide()

    def remove(self, model: str) -> None:
        """The model exists no more. Raises ValueError if it has a process or is waited for."""
        entry = self._models[model]
        if entry.waiting or any(instance.phase is not Phase.ABSENT for instance in entry.instances):
            raise ValueError(f"model {model!r} is in use")
        del self._models[model]
        self._pinned.pop(model, None)
        self._foresight.forget(model)

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
            self._stir(instance.model)
            self._rest(instance)
            self._decide()

    def resize(self, model: str, memory: int, gpus: Sequence[tuple[int, ...]] = ((),)) -> None:
        """A further instance of the model is expected to take so many bytes of this machine's memory and, for each of
        the model's placements, of each GPU.
        """
        self._models[model].rooms = [Room(1, memory, shares) for shares in gpus]
        self._room_changed = True
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
        if not self._ledger.fits(Room()):
            self.give_up_ahead()  # beside what runs there is no room for it after all
        self._room_changed = True
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
        instance = None if entry.waiting else entry.choose(waiting)
        if instance is not None:
            self._grant(waiting, instance)
        else:
            refusal = self._line.refusal(entry)
            if refusal is not None:
                self._effects.reject(ticket, refusal)
                return
            self._line.put(waiting)
            self._stir(entry)
        self._decide()

    def cancel(self, ticket: int) -> bool:
        """The caller of a waiting request has left. Returns False, and does nothing, if it is not waiting (any
        more).
        """
        waiting = self._line.take(ticket)
        if waiting is None:
            return False
        self._stir(waiting.model)
        self._decide()
        return True

    def finish(self, ticket: int) -> None:
        """A granted request has ended, however. Unknown tickets are ignored: its worker's end may have come first."""
        waiting = self._granted.pop(ticket, None)
        instance = None if waiting is None else waiting.instance
        if instance is not None:
            del instance.granted[ticket]
            self._touch(instance)
            if not instance.granted:
                self._budget.leave(instance.key)
                self._rest(instance)
            if instance.model.waiting:
                self._stir(instance.model)
            self._decide()

    def hold(self, model: str, replica: int) -> None:
        """An instance does something beside requests that is not to be cut short; it counts as use. Until
        :meth:`let_go` it is neither stopped for room nor because it idles or retires.
        """
        instance = self._models[model].instances[replica]
        instance.errands += 1
        self._touch(instance)
        self._idle.pop(instance.key, None)

    def let_go(self, model: str, replica: int) -> None:
        """What :meth:`hold` told of has ended. No effect if the instance's process has gone meanwhile."""
        instances = self._models[model].instances
        if replica < len(instances) and instances[replica].errands:
            instance = instances[replica]
            instance.errands -= 1
            self._touch(instance)
            self._rest(instance)
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
            self._stir(entry)
            self._rest(instance)
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
        self,
        model: str,
        error: PoolError | None = None,
        *,
        replica: int = 0,
        short_of_memory: bool = False,
        again: Collection[int] = (),
    ) -> bool:
        """A process is gone. Granted requests end with it, except those whose tickets are to wait ``again``; with an
        ``error``, those that wait for the model end too, unless another instance serves them.

        ``short_of_memory`` says that its load failed for that reason. Returns True if room was made and the start will
        be tried again, with everyone who waits for it.
        """
        entry = self._models[model]
        instance = entry.instances[replica]
        starting = instance.phase is Phase.STARTING
        self._set_phase(instance, Phase.ABSENT)
        self._release(instance)
        self._lose_granted(instance, again)
        instance.prefixes.clear()
        instance.errands = 0
        self._budget.forget(instance.key)
        instance.retiring = False
        if instance.victim_of is not None:
            self._stir(instance.victim_of)
            instance.victim_of.victim = None
            instance.victim_of = None
        entry.trim()
        tried_again = starting and short_of_memory and self._make_second_try(entry)
        if error is not None and not tried_again:
            entry.second_try, entry.victim = False, None
            if entry.live:
                entry.stunted = True
            else:
                self._reject_waiting(entry, error)
        self._decide()
        return tried_again

    def unload(self, model: str, error: PoolError) -> bool:
        """Someone wants the model stopped, busy or not: requests that wait for it end with ``error``.

        Returns False if it is not running. What was granted is the caller's to end.
        """
        entry = self._models[model]
        running = [one for one in entry.instances if one.phase not in (Phase.ABSENT, Phase.STOPPING)]
        self._foresight.forget(model)
        if not running:
            return False
        self._reject_waiting(entry, error)
        entry.stunted = False
        for instance in running:
            self._stop(instance)
        self._stir(entry)
        self._decide()
        return True

    def dismiss(self, model: str, replica: int) -> None:
        """Stop one idle instance; no effect on one that is in use."""
        entry = self._models[model]
        instance = entry.instances[replica]
        if instance.idle and not entry.waiting:
            self._stop(instance)
            self._decide()

    def let_grow(self, model: str) -> None:
        """A further replica may be tried again after one that failed."""
        entry = self._models[model]
        entry.stunted = False
        self._stir(entry)
        self._decide()

    # --- events: the spare ---

    def load_ahead(self, may: Callable[[str], bool]) -> str | None:
        """A spare without a model has nothing to do. Return which model it is to load ahead, if any that ``may`` is
        likely wanted next and there is room; its bytes count from now on, until it is started or :meth:`ahead_gone`.
        """
        if not self._limits.budgeted or self._line.hungry or self._line.growing or self._ledger.lends:
            return None
        for name in self._foresight.likely():
            entry = self._models[name]
            room = entry.rooms[0]
            absent = all(one.phase is Phase.ABSENT for one in entry.instances)
            if absent and not entry.placed and room.total and self._ledger.fits(replace(room, places=0)) and may(name):
                self._ledger.load_ahead(room)
                return name
        return None

    def give_up_ahead(self) -> None:
        """What was loaded ahead is not to be kept. No effect if there is nothing, or it is on its way out."""
        if self._ledger.ahead.total:
            self._ledger.drop_ahead()
            self._effects.drop_ahead()

    def forget(self, model: str) -> None:
        """Nobody expects the model back: it is not to be loaded ahead."""
        self._foresight.forget(model)

    def ahead_gone(self, model: str) -> None:
        """What was loaded ahead is gone, or could not be loaded; it is not tried again before it had to go again."""
        self._foresight.forget(model)
        self._ledger.end_ahead()
        for held_up in self._awaits_spare:
            held_up.awaits_spare = False
            self._stir(held_up)
        self._awaits_spare.clear()
        self._room_changed = True
        self._decide()

    # --- the decision ---

    def _stir(self, model: Model) -> None:
        """Something has changed about a model that a decision has to look at."""
        self._stirred[model.name] = model

    def _rest(self, instance: Instance) -> None:
        """An instance may be idle now: it can go for something else, and one that retires is stopped."""
        if not instance.idle:
            return
        if instance.retiring:
            self._stop(instance)
        else:
            self._idle[instance.key] = instance
            self._room_changed = True

    def _decide(self) -> None:
        self._settle()
        while self._room_changed and (self._line.hungry or self._line.growing):
            self._room_changed = False
            if self._line.hungry:
                self._make_way()
            else:
                self._grow()
            self._settle()
        self._room_changed = False

    def _settle(self) -> None:
        """Look at the models about which something has changed, until nothing does any more, and tell what follows."""
        while self._stirred:
            stirred, self._stirred = self._stirred, {}
            for model in stirred.values():
                self._look_at(model)
        # Threads first: a worker's first step is to be computed with its share, and the others' with what that leaves.
        if self._budget.stale:
            for (name, replica), n in self._budget.news().items():
                self._effects.threads(name, replica, n)
        if self._grants:
            grants, self._grants = self._grants, []
            for ticket, replica in grants:
                self._effects.grant(ticket, replica)

    def _look_at(self, model: Model) -> None:
        """Grant what waits for a model where it has free slots, wake what sleeps, and see what it lacks then."""
        while model.waiting:
            head = model.head
            instance = model.choose(head)
            if instance is None:
                self._wake_sleepers(model)
                break
            self._line.take(head.ticket)
            self._grant(head, instance)
        was_hungry = model.name in self._line.hungry
        if self._line.look_at(model):
            self._room_changed = True
        if was_hungry and not model.hungry:
            self._release_drains(model)

    def _grant(self, waiting: Waiting, instance: Instance) -> None:
        """Give a request, which does not wait any more, to an instance, and count whom that overtakes."""
        model = waiting.model
        self._touch(instance)
        self._line.satisfy(model)
        if waiting.holds:
            if not instance.granted:
                self._idle.pop(instance.key, None)
                self._budget.join(instance.key)
            waiting.instance = instance
            instance.granted[waiting.ticket] = self._granted[waiting.ticket] = waiting
            if model.replicas > 1:
                instance.prefixes.note(waiting.prefix)
        if self._line.hungry and not model.pinned and self._line.overtake():
            self._room_changed = True
        self._grants.append((waiting.ticket, instance.index))

    def _wake_sleepers(self, model: Model) -> None:
        """Wake as many of the sleeping instances as those who wait need."""
        for instance in model.instances:
            if instance.phase is Phase.ASLEEP and not instance.retiring and model.lacks_slots:
                self._idle.pop(instance.key, None)
                instance.phase = Phase.STARTING
                self._effects.wake(model.name, instance.index)

    def _make_way(self) -> None:
        """Start what is needed, as far as there is room or room can be made."""
        promised, lent = Room(), self._ledger.ahead
        for model in self._line.in_turn():
            need = promised + self._ledger.need(model.next_room)
            if not model.placed:
                need -= lent
            refusal = hopeless(model, self._pinned.values(), self._limits)
            if refusal is not None:
                self._reject_waiting(model, refusal)
                continue
            if self._ledger.fits(need):
                self._start(model)
                lent = self._ledger.ahead
                continue
            if model.placed:
                self.give_up_ahead()
                lent = Room()  # what is being given up is nobody's before it is gone
            if self._ledger.will_fit(need) or self._make_room(need, model):
                promised = need  # its room comes with the exits of what was stopped
            elif self._line.overtaken(model) >= self._limits.max_overtakes:
                self._drain_for(model)
                promised = need  # what the drained models free is not for those behind
            else:
                continue
            lent = Room()  # it is in what was promised
        self._line.set_alarm()

    def _grow(self) -> None:
        """Start further replicas where too many wait, as far as there is room to spare. Rule 6."""
        for model in list(self._line.growing.values()):
            while model.may_grow:
                need = self._ledger.need(model.next_room)
                lent = self._ledger.ahead
                if not self._ledger.fits(need if model.placed else need - lent):
                    if model.placed and self._ledger.fits(need - lent):
                        self.give_up_ahead()
                    break
                self._start(model)

    def _start(self, model: Model) -> None:
        instance = model.startable
        assert instance is not None
        instance.room = model.next_room
        if not model.placed and self._ledger.ahead.total:
            self._ledger.end_ahead()
        self._foresight.started(model.name)
        self._set_phase(instance, Phase.STARTING)
        self._line.satisfy(model)
        self._touch(instance)
        self._effects.start(model.name, instance.index)

    # --- making room ---

    def _make_room(self, need: Room, wanted: Model) -> bool:
        """Stop idle instances, as many as it takes; none if all of them do not do. Rule 4."""
        found = victims(dispensable(self._idle.values()), self._ledger.after_exits(need), self._limits)
        for victim in found:
            self._evict(victim, wanted.name)
        return bool(found)

    def _stop(self, instance: Instance, heir: str | None = None) -> None:
        self._release(instance)
        self._set_phase(instance, Phase.STOPPING)
        self._effects.stop(*instance.key, heir)

    def _evict(self, instance: Instance, heir: str | None = None) -> None:
        self.evictions[instance.key[0]] += 1
        self._foresight.displaced(instance.key[0])
        self._stop(instance, heir)

    def _retire(self, instance: Instance) -> None:
        self._stir(instance.model)
        if instance.phase is Phase.STARTING and not instance.errands:
            self._stop(instance)
        elif instance.live:
            self._release(instance)
            instance.retiring = True
            self._idle.pop(instance.key, None)
            self._rest(instance)

    def _make_second_try(self, model: Model) -> bool:
        """Stop something idle for a model whose load found too little memory. Rule 10."""
        spare_goes = self._ledger.ahead.total > 0
        self.give_up_ahead()  # even if this is not tried again: or the next attempt would find as little
        if not model.waiting or model.live or model.second_try:
            return False
        if spare_goes:
            model.second_try = model.awaits_spare = True
            self._awaits_spare.append(model)
            return True
        idle = dispensable(self._idle.values())
        if not idle:
            return False
        # One on the same GPU, if any is known to be.
        victim = next((one for one in idle if one.room.meets(model.next_room)), idle[0])
        self._evict(victim)
        model.second_try, model.victim, victim.victim_of = True, victim, model
        return True

    # --- draining ---

    def _drain_for(self, wanted: Model) -> None:
        """Drain one instance for every ``max_overtakes`` times that a model was overtaken. Rule 5."""
        drained = sum(instance.drained_for is wanted for instance in self._drained.values())
        due = self._line.overtaken(wanted) // self._limits.max_overtakes - drained
        for instance in drainable(self._models.values(), due) if due > 0 else ():
            instance.drained_for = wanted
            self._drained[instance.key] = instance
            self._stir(instance.model)
            self._room_changed = self._room_changed or instance.idle

    def _release_drains(self, model: Model) -> None:
        """Undo the draining of instances for a model that is not waited for any more, or has started."""
        for instance in [one for one in self._drained.values() if one.drained_for is model]:
            self._release(instance)

    def _release(self, instance: Instance) -> None:
        if instance.drained_for is not None:
            instance.drained_for = None
            del self._drained[instance.key]
            self._stir(instance.model)

    # --- bookkeeping ---

    def _reject_waiting(self, model: Model, error: PoolError) -> None:
        for waiting in list(model.in_turn()):
            self._line.take(waiting.ticket)
            self._effects.reject(waiting.ticket, error)
        self._stir(model)

    def _lose_granted(self, instance: Instance, again: Collection[int]) -> None:
        if not instance.granted:
            return
        self._budget.leave(instance.key)
        for ticket, waiting in instance.granted.items():
            del self._granted[ticket]
            waiting.instance = None
            if ticket in again:
                self._line.put(waiting)
        instance.granted.clear()

    def _set_phase(self, instance: Instance, phase: Phase) -> None:
        self._count(instance, -1)
        instance.phase = phase
        self._count(instance, +1)
        self._idle.pop(instance.key, None)
        self._stir(instance.model)
        self._room_changed = True

    def _count(self, instance: Instance, sign: int) -> None:
        if instance.phase is not Phase.ABSENT:
            self._ledger.count(instance.room, stopping=instance.phase is Phase.STOPPING, sign=sign)

    def _touch(self, instance: Instance) -> None:
        self._clock += 1
        instance.last_used = self._clock
        if instance.key in self._idle:
            self._idle[instance.key] = self._idle.pop(instance.key)  # they stay in the order of their last use
