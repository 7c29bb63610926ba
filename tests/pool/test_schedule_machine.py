"""A state machine plays the pool: whatever happens in whatever order, the scheduler's rules hold after every step."""

from collections import Counter
from collections.abc import Callable
from itertools import product

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llamaherd.pool.errors import LoadFailed, PoolError, QueueFull, WorkerFailed
from llamaherd.pool.roster import AFFINITY_SLACK, Key
from llamaherd.pool.schedule import Limits, Phase, Scheduler

MIB = 1024 * 1024
MODELS = ["a", "b", "c", "d", "unknown"]
SIZES = {"a": 3 * MIB, "b": 2 * MIB, "c": 7 * MIB, "d": 2 * MIB, "unknown": 0}
BUDGET = 9 * MIB
#: What the models take of one GPU, and what there is of it.
ON_GPU = {"a": 2 * MIB, "b": 1 * MIB, "c": 2 * MIB, "d": 0, "unknown": 0}
GPU_BUDGET = 4 * MIB
SLOTS = 2
LIMIT = 3
OVERTAKES = 3
QUEUE_MAX = 12
CORES = 4
MOST_REPLICAS = 3
RUNNING = (Phase.STARTING, Phase.READY, Phase.ASLEEP)


class Herd(RuleBasedStateMachine):
    """Random requests, departures, loads, exits, failures, reloads and commands, and a spare that loads ahead. ``d`` is
    pinned, ``b`` has replicas, ``c`` cannot be a spare's, and nobody knows what ``unknown`` takes.
    """

    limit = LIMIT
    budget = BUDGET

    def __init__(self) -> None:
        super().__init__()
        limits = Limits(
            models_max=self.limit,
            memory_budget=self.budget,
            gpu_budgets=(GPU_BUDGET,),
            max_overtakes=OVERTAKES,
            cores=CORES,
            queue_max=QUEUE_MAX,
        )
        self.scheduler = Scheduler(self, limits)
        self.replicas = dict.fromkeys(MODELS, 1) | {"b": 2}
        self.phase: dict[Key, Phase] = dict.fromkeys(product(MODELS, range(MOST_REPLICAS)), Phase.ABSENT)
        self.next_ticket = 0
        self.waiting: dict[int, str] = {}
        self.priority: dict[int, int] = {}
        self.granted: dict[int, Key] = {}
        self.passed: dict[str, int] = {}
        self.told: dict[Key, int] = {}
        #: Who was told of threads and has to be busy now; what is done beside requests; what only wants a model ready.
        self.just_told: set[Key] = set()
        self.held: Counter[Key] = Counter()
        self.errands: set[int] = set()
        #: Instances that someone has asked to stop, and those that retire.
        self.forced: set[Key] = set()
        self.retiring: set[Key] = set()
        #: What was stopped for a model that was short of memory, and the models that have used up their second try.
        self.victims: dict[str, Key] = {}
        self.await_spare: set[str] = set()
        self.stunted: set[str] = set()
        self.stops: list[Key] = []
        #: What the spare has loaded ahead, whether it is to go, and what has had to make room.
        self.ahead: str | None = None
        self.dropped = False
        self.displaced: set[str] = set()
        for model in MODELS:
            self.scheduler.add(
                model, slots=SLOTS, replicas=self.replicas[model], pinned=model == "d", placed=model == "c"
            )
            self.scheduler.resize(model, SIZES[model], [(ON_GPU[model],)])

    # what the machine knows

    def busy(self, key: Key) -> int:
        return sum(holder == key for holder in self.granted.values())

    def live(self, model: str) -> list[Key]:
        keys = product([model], range(MOST_REPLICAS))
        return [key for key in keys if self.phase[key] in RUNNING and key not in self.retiring]

    def startable(self, model: str) -> bool:
        return any(self.phase[model, replica] is Phase.ABSENT for replica in range(self.replicas[model]))

    def hungry(self, model: str) -> bool:
        victim = self.victims.get(model)
        held_up = (victim is not None and self.phase[victim] is Phase.STOPPING) or model in self.await_spare
        return model in self.waiting.values() and not self.live(model) and self.startable(model) and not held_up

    def keys_in(self, *phases: Phase) -> list[Key]:
        return [key for key, phase in self.phase.items() if phase in phases]

    # effects

    def start(self, model: str, replica: int) -> None:
        key = (model, replica)
        assert self.phase[key] is Phase.ABSENT, "an instance has at most one process"
        assert replica < self.replicas[model]
        if self.live(model):
            assert not any(self.hungry(other) for other in MODELS), "nothing grows while somebody waits for room"
        if not SIZES[model]:
            present = [other for other, phase in self.phase.items() if phase is not Phase.ABSENT]
            assert len(present) + self.dropped < self.limit, (
                "what is unknown starts beside nothing that still has to leave"
            )
        self.phase[key] = Phase.STARTING
        self.passed[model] = 0
        self.displaced.discard(model)
        if model != "c" and not self.dropped:
            self.ahead = None  # the spare has become this

    def drop_ahead(self) -> None:
        assert self.ahead is not None and not self.dropped
        self.dropped = True

    def wake(self, model: str, replica: int) -> None:
        assert self.phase[model, replica] is Phase.ASLEEP
        self.phase[model, replica] = Phase.STARTING

    def stop(self, model: str, replica: int, heir: str | None = None) -> None:
        key = (model, replica)
        if key not in self.forced:
            assert self.phase[key] in (Phase.READY, Phase.ASLEEP), "only what is ready is stopped for room"
            assert not self.busy(key), "nothing busy is stopped for room"
            assert not self.held[key], "nothing is cut short for room"
            last = self.live(model) == [key]
            assert model != "d" or not last or key in self.retiring, "what is pinned is never stopped for room"
            self.displaced.add(model)
        assert heir is None or (self.hungry(heir) and key not in self.forced), "who is to take it over wants it"
        self.phase[key] = Phase.STOPPING
        self.stops.append(key)

    def grant(self, ticket: int, replica: int) -> None:
        model = self.waiting.pop(ticket)
        key = (model, replica)
        assert self.phase[key] is Phase.READY, "a request goes to a ready instance only"
        assert key not in self.retiring
        assert self.busy(key) < SLOTS or ticket in self.errands, "slots are not overbooked"
        ready = [other for other in self.live(model) if self.phase[other] is Phase.READY]
        if not any(self.hungry(other) for other in MODELS):  # then none is drained
            assert self.busy(key) <= min(map(self.busy, ready)) + AFFINITY_SLACK, "affinity does not outweigh the load"
        if ticket not in self.errands:
            self.granted[ticket] = key
            assert key in self.told, "a worker hears of its threads before its first request"
        ahead = [other for other, wanted in self.waiting.items() if wanted == model and other < ticket]
        assert all(self.priority[other] < self.priority[ticket] for other in ahead), "equals go by age"
        if model != "d":
            for other in MODELS:
                if self.hungry(other):
                    self.passed[other] = self.passed.get(other, 0) + 1

    def reject(self, ticket: int, error: PoolError) -> None:
        if isinstance(error, QueueFull) and error.code == "queue_full":
            assert len(self.waiting) > QUEUE_MAX and ticket == self.next_ticket, "who was accepted is not refused"
        del self.waiting[ticket]

    def threads(self, model: str, replica: int, n: int) -> None:
        self.told[model, replica] = n
        self.just_told.add((model, replica))

    # events

    @rule(
        model=st.sampled_from(MODELS),
        priority=st.integers(0, 2),
        holds=st.sampled_from((True, True, True, False)),
        prefix=st.lists(st.integers(0, 3), max_size=3),
    )
    def request(self, model: str, priority: int, holds: bool, prefix: list[int]) -> None:
        self.next_ticket += 1
        self.waiting[self.next_ticket] = model
        self.priority[self.next_ticket] = priority
        if not holds:
            self.errands.add(self.next_ticket)
        self.scheduler.request(self.next_ticket, model, priority=priority, holds=holds, prefix=tuple(prefix))

    @precondition(lambda self: Phase.READY in self.phase.values())
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self.keys_in(Phase.READY)))
        self.held[key] += 1
        self.scheduler.hold(*key)

    @precondition(lambda self: self.held.total())
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(+self.held)))
        self.held[key] -= 1
        self.scheduler.let_go(*key)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def depart(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.waiting)))
        del self.waiting[ticket]
        assert self.scheduler.cancel(ticket)

    @precondition(lambda self: self.granted)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.granted)))
        del self.granted[ticket]
        self.scheduler.finish(ticket)

    @precondition(lambda self: Phase.STARTING in self.phase.values())
    @rule(data=st.data())
    def become_ready(self, data: st.DataObject) -> None:
        self._start_up(data.draw(st.sampled_from(self.keys_in(Phase.STARTING))))

    @precondition(lambda self: Phase.READY in self.phase.values())
    @rule(data=st.data())
    def sleep(self, data: st.DataObject) -> None:
        model, replica = key = data.draw(st.sampled_from(self.keys_in(Phase.READY)))
        idle = not self.busy(key) and model not in self.waiting.values()
        if idle:
            self.phase[key] = Phase.ASLEEP
        assert self.scheduler.asleep(model, replica) is idle

    @precondition(lambda self: self.keys_in(*RUNNING, Phase.STOPPING))
    @rule(data=st.data(), deserving=st.booleans())
    def exit(self, data: st.DataObject, deserving: bool) -> None:
        model, replica = key = data.draw(st.sampled_from(self.keys_in(*RUNNING, Phase.STOPPING)))
        error = LoadFailed("no") if self.phase[key] is Phase.STARTING else None
        lost = [ticket for ticket, holder in self.granted.items() if holder == key]
        again = lost[::2] if deserving else []
        self._gone(key)
        if error is not None:
            self.stunted.add(model)
        self.waiting.update(dict.fromkeys(again, model))
        self.waiting = dict(sorted(self.waiting.items()))
        self.scheduler.exited(model, error, replica=replica, again=again)

    @precondition(lambda self: Phase.STARTING in self.phase.values())
    @rule(data=st.data())
    def run_out_of_memory(self, data: st.DataObject) -> None:
        model, replica = key = data.draw(st.sampled_from(self.keys_in(Phase.STARTING)))
        waiting = list(self.waiting.values()).count(model)
        self._gone(key)
        self.stunted.add(model)
        self.stops.clear()
        if self.scheduler.exited(model, LoadFailed("memory"), replica=replica, short_of_memory=True):
            assert list(self.waiting.values()).count(model) == waiting, "who waits for a second try goes on waiting"
            if self.stops:
                self.victims[model] = self.stops[0]
            else:
                assert self.dropped, "something goes for it"
                self.await_spare.add(model)

    def _gone(self, key: Key) -> None:
        self.phase[key] = Phase.ABSENT
        del self.held[key]
        self.forced.discard(key)
        self.retiring.discard(key)
        self.granted = {ticket: holder for ticket, holder in self.granted.items() if holder != key}

    @rule(model=st.sampled_from(MODELS))
    def unload(self, model: str) -> None:
        running = [key for key in self.keys_in(*RUNNING) if key[0] == model]
        self.forced.update(running)
        self.stunted.discard(model)
        self.displaced.discard(model)
        assert self.scheduler.unload(model, WorkerFailed("unloaded")) is bool(running)

    @precondition(lambda self: self.keys_in(*RUNNING))
    @rule(data=st.data())
    def retire(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self.keys_in(*RUNNING)))
        self._note_retirement(key)
        self.scheduler.retire(*key)

    def _note_retirement(self, key: Key) -> None:
        if self.phase[key] is Phase.STARTING and not self.held[key]:
            self.forced.add(key)
        elif self.phase[key] in RUNNING:
            self.retiring.add(key)

    @precondition(lambda self: self.retiring)
    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.retiring)))
        if self.phase[key] is not Phase.STOPPING:
            self.retiring.discard(key)
        self.scheduler.retain(*key)

    @rule(replicas=st.integers(1, MOST_REPLICAS))
    def change(self, replicas: int) -> None:
        self.replicas["b"] = replicas
        self.stunted.discard("b")
        for replica in range(replicas, MOST_REPLICAS):
            self._note_retirement(("b", replica))
        self.scheduler.change("b", slots=SLOTS, replicas=replicas, pinned=False)

    @precondition(lambda self: self.keys_in(Phase.READY, Phase.ASLEEP))
    @rule(data=st.data())
    def dismiss(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self.keys_in(Phase.READY, Phase.ASLEEP)))
        if not self.busy(key) and not self.held[key] and key[0] not in self.waiting.values():
            self.forced.add(key)
        self.scheduler.dismiss(*key)

    @rule(model=st.sampled_from(MODELS))
    def let_grow(self, model: str) -> None:
        self.stunted.discard(model)
        self.scheduler.let_grow(model)

    @precondition(lambda self: self.ahead is None)
    @rule(may=st.sets(st.sampled_from(MODELS)))
    def load_ahead(self, may: set[str]) -> None:
        self._look_ahead(may)

    def _look_ahead(self, may: set[str]) -> None:
        chosen = self.scheduler.load_ahead(may.__contains__)
        if chosen is not None:
            assert chosen in may & self.displaced, "only what had to make room is expected back"
            assert not any(self.hungry(model) for model in MODELS), "nothing is loaded ahead while somebody waits"
            assert chosen != "c" and SIZES[chosen], "only what a spare can become, and where it is known what it takes"
            assert all(self.phase[chosen, replica] is Phase.ABSENT for replica in range(MOST_REPLICAS))
        self.ahead = chosen

    @precondition(lambda self: self.ahead is not None)
    @rule(asked=st.booleans())
    def lose_ahead(self, asked: bool) -> None:
        if asked and not self.dropped:
            self.scheduler.give_up_ahead()
            assert self.dropped
            return
        assert self.ahead is not None
        gone, self.ahead, self.dropped = self.ahead, None, False
        self.displaced.discard(gone)
        self.await_spare.clear()
        self.scheduler.ahead_gone(gone)

    # rules that always hold

    def _taken(self) -> list[str]:
        """Return the models whose bytes count, as often as they do."""
        running = [model for model, _ in self.keys_in(*RUNNING, Phase.STOPPING)]
        return running if self.ahead is None else [*running, self.ahead]

    @invariant()
    def the_limits_hold(self) -> None:
        assert sum(SIZES[model] for model in self._taken()) <= self.budget
        assert sum(ON_GPU[model] for model in self._taken()) <= GPU_BUDGET
        stopping_unknown = [model for model, _ in self.keys_in(Phase.STOPPING) if not SIZES[model]]
        assert len(self.keys_in(*RUNNING)) + len(stopping_unknown) <= self.limit

    @invariant()
    def both_sides_agree(self) -> None:
        for model in MODELS:
            for replica in range(self.replicas[model]):
                assert self.scheduler.phase(model, replica) is self.phase[model, replica]
                assert self.scheduler.in_flight(model, replica) == self.busy((model, replica))
            places = [(ticket, self.priority[ticket]) for ticket, wanted in self.waiting.items() if wanted == model]
            assert self.scheduler.queue(model) == sorted(places, key=lambda place: (-place[1], place[0]))
            assert self.scheduler.queued(model) == len(places)
            in_flight = sum(self.busy((model, replica)) for replica in range(MOST_REPLICAS))
            assert self.scheduler.in_flight(model) == in_flight
            running = [key for key in self.keys_in(*RUNNING, Phase.STOPPING) if key[0] == model]
            assert self.scheduler.memory(model) == (SIZES[model] + ON_GPU[model]) * max(1, len(running))

    def _has_room_for(self, *models: str) -> bool:
        """Whether there would be room even if what is leaving kept its places, and a spare that is to go its bytes."""
        present = [model for model, _ in self.keys_in(*RUNNING, Phase.STOPPING)] + list(models)
        taken = [*present, self.ahead] if self.ahead is not None and self.dropped else present
        memory, on_gpu = sum(map(SIZES.__getitem__, taken)), sum(map(ON_GPU.__getitem__, taken))
        return len(taken) <= self.limit and memory <= self.budget and on_gpu <= GPU_BUDGET

    @invariant()
    def nobody_waits_while_there_is_room_for_all_who_wait(self) -> None:
        hungry = [model for model in MODELS if self.hungry(model)]
        assert not hungry or not self._has_room_for(*hungry)

    @invariant()
    def a_model_grows_while_more_wait_than_it_has_slots_for(self) -> None:
        waiting = sum(model == "b" and ticket not in self.errands for ticket, model in self.waiting.items())
        live = self.live("b")
        coming = SLOTS * sum(self.phase[key] is Phase.STARTING for key in live)
        asleep = any(self.phase[key] is Phase.ASLEEP for key in live)
        assert not live or waiting <= coming or not asleep, "sleepers are woken first"
        may = self.startable("b") and "b" not in self.stunted and not any(self.hungry(model) for model in MODELS)
        assert not live or waiting <= coming or not may or not self._has_room_for("b")

    @invariant()
    def busy_instances_share_the_cores(self) -> None:
        busy = set(self.granted.values())
        assert self.just_told <= busy, "only busy instances are told of threads"
        self.just_told.clear()
        assert not busy or sum(self.told[key] for key in busy) == max(CORES, len(busy))

    @invariant()
    def nobody_waits_for_a_ready_instance_with_a_free_slot(self) -> None:
        if not any(self.hungry(model) for model in MODELS):
            for model in self.waiting.values():
                ready = [key for key in self.live(model) if self.phase[key] is Phase.READY]
                assert all(self.busy(key) == SLOTS for key in ready)

    @invariant()
    def overtaking_is_bounded(self) -> None:
        for model in MODELS:
            if self.hungry(model):
                assert self.passed.get(model, 0) <= OVERTAKES * self.limit

    def teardown(self) -> None:
        """Left alone, the herd serves everyone who waits."""
        for _ in range(100 * len(MODELS) + 4 * self.next_ticket):
            if not self.waiting and not self.granted and not self.held.total():
                return
            self._let_one_thing_happen()
        raise AssertionError(f"these requests wait for ever: {self.waiting}")

    def _let_one_thing_happen(self) -> None:
        moves: list[tuple[Phase, Callable[[Key], None]]] = [
            (Phase.STOPPING, self._shut_down),
            (Phase.STARTING, self._start_up),
        ]
        for phase, move in moves:
            for key in self.keys_in(phase):
                move(key)
                return
        if self.ahead is not None and self.dropped:
            self.lose_ahead(False)
            return
        if self.granted:
            ticket = min(self.granted)
            del self.granted[ticket]
            self.scheduler.finish(ticket)
        elif self.held.total():
            key = min(+self.held)
            self.held[key] -= 1
            self.scheduler.let_go(*key)

    def _shut_down(self, key: Key) -> None:
        self._gone(key)
        self.scheduler.exited(key[0], replica=key[1])

    def _start_up(self, key: Key) -> None:
        self.phase[key] = Phase.READY
        self.victims.pop(key[0], None)
        self.scheduler.ready(*key)


class Foresighted(Herd):
    """The same with few places, more memory, and a spare that loads ahead whenever it may."""

    limit = 2
    budget = BUDGET + 3 * MIB

    @rule(model=st.sampled_from(MODELS))
    def serve(self, model: str) -> None:
        self.request(model=model, priority=0, holds=True, prefix=[])
        self.teardown()
        self.just_told.clear()  # of the steps between, which nobody has looked at

    @invariant()
    def the_spare_is_put_to_use(self) -> None:
        if self.ahead is None:
            self._look_ahead(set(MODELS))


SETTINGS = settings(
    max_examples=150,
    stateful_step_count=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)

TestHerd = Herd.TestCase
TestHerd.settings = SETTINGS
TestForesighted = Foresighted.TestCase
TestForesighted.settings = SETTINGS
