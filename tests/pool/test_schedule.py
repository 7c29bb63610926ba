"""The scheduler decides well: no process, no clock, only events in and effects out."""

import sys
from typing import Any

import pytest

from llamaherd.pool.errors import LoadFailed, PoolError, WorkerFailed
from llamaherd.pool.roster import Model
from llamaherd.pool.schedule import Limits, Phase, Scheduler

MIB = 1024 * 1024


def named(model: str, replica: int) -> str:
    return f"{model}#{replica}" if replica else model


class Recorder:
    """Takes note of effects, in order, as words."""

    def __init__(self) -> None:
        self.said: list[str] = []
        #: For which model each of those was stopped that had to make room.
        self.heirs: dict[str, str] = {}

    def start(self, model: str, replica: int) -> None:
        self.said.append(f"start {named(model, replica)}")

    def drop_ahead(self) -> None:
        raise AssertionError("nothing was loaded ahead")

    def wake(self, model: str, replica: int) -> None:
        self.said.append(f"wake {named(model, replica)}")

    def stop(self, model: str, replica: int, heir: str | None = None) -> None:
        self.said.append(f"stop {named(model, replica)}")
        if heir is not None:
            self.heirs[named(model, replica)] = heir

    def grant(self, ticket: int, replica: int) -> None:
        self.said.append(f"grant {ticket} to #{replica}" if replica else f"grant {ticket}")

    def reject(self, ticket: int, error: PoolError) -> None:
        self.said.append(f"reject {ticket}: {error}")

    def threads(self, model: str, replica: int, n: int) -> None:
        self.said.append(f"threads {named(model, replica)} {n}")

    def take(self) -> list[str]:
        said, self.said = self.said, []
        return said


def herd_of(*models: str, models_max: int = 1, max_overtakes: int = 16) -> tuple[Scheduler, Recorder]:
    effects = Recorder()
    scheduler = Scheduler(effects, Limits(models_max=models_max, max_overtakes=max_overtakes))
    for model in models:
        scheduler.add(model)
    return scheduler, effects


def loaded(*models: str, models_max: int = 1, max_overtakes: int = 16) -> tuple[Scheduler, Recorder]:
    """A herd whose first ``models_max`` models are ready and idle."""
    scheduler, effects = herd_of(*models, models_max=models_max, max_overtakes=max_overtakes)
    for ticket, model in enumerate(models[:models_max], start=1000):
        scheduler.request(ticket, model)
        scheduler.ready(model)
        scheduler.finish(ticket)
    effects.take()
    return scheduler, effects


def test_a_request_starts_its_model_and_is_granted_when_the_model_is_ready() -> None:
    scheduler, effects = herd_of("a")
    scheduler.request(1, "a")
    assert effects.take() == ["start a"]
    scheduler.ready("a")
    assert effects.take() == ["grant 1"]
    assert repr(scheduler) == "<Scheduler [Models: 1 of 1 running, 1 busy | Requests: 1 granted, 0 waiting]>"


def test_requests_for_one_model_share_its_one_start() -> None:
    scheduler, effects = herd_of("a")
    for ticket in (1, 2, 3):
        scheduler.request(ticket, "a")
    scheduler.ready("a")
    assert effects.take() == ["start a", "grant 1", "grant 2", "grant 3"]


def test_a_request_for_a_ready_model_is_granted_at_once() -> None:
    scheduler, effects = loaded("a")
    scheduler.request(1, "a")
    assert effects.take() == ["grant 1"]


def test_a_busy_model_is_never_stopped_for_another() -> None:
    scheduler, effects = loaded("a", "b")
    scheduler.request(1, "a")
    scheduler.request(2, "b")
    assert effects.take() == ["grant 1"]
    scheduler.finish(1)
    assert effects.take() == ["stop a"]
    scheduler.exited("a")
    assert effects.take() == ["start b"]


def test_a_loading_model_is_never_stopped_for_another() -> None:
    scheduler, effects = herd_of("a", "b")
    scheduler.request(1, "a")
    scheduler.cancel(1)
    scheduler.request(2, "b")
    assert effects.take() == ["start a"]
    scheduler.ready("a")
    assert effects.take() == ["stop a"]


def test_the_model_used_longest_ago_makes_room() -> None:
    scheduler, effects = loaded("a", "b", "c", models_max=2)
    scheduler.request(1, "a")
    scheduler.finish(1)
    scheduler.request(2, "c")
    assert effects.take() == ["grant 1", "stop b"]


def test_a_model_starts_only_when_the_process_that_made_room_is_gone() -> None:
    scheduler, effects = loaded("a", "b")
    scheduler.request(1, "b")
    assert effects.take() == ["stop a"]
    scheduler.request(2, "b")
    assert effects.take() == []
    scheduler.exited("a")
    assert effects.take() == ["start b"]


def test_one_stop_is_begun_per_model_that_needs_room() -> None:
    scheduler, effects = loaded("a", "b", "c", "d", models_max=2)
    scheduler.request(1, "c")
    assert effects.take() == ["stop a"]
    scheduler.request(2, "c")
    assert effects.take() == []
    scheduler.request(3, "d")
    assert effects.take() == ["stop b"]


def test_two_waiters_for_one_freed_place_are_both_served() -> None:
    scheduler, effects = loaded("a", "b", "c")
    scheduler.request(1, "b")
    scheduler.request(2, "c")
    scheduler.exited("a")
    scheduler.ready("b")
    scheduler.finish(1)
    scheduler.exited("b")
    scheduler.ready("c")
    assert effects.take() == ["stop a", "start b", "grant 1", "stop b", "start c", "grant 2"]


def test_without_a_limit_everything_starts() -> None:
    scheduler, effects = herd_of("a", "b", "c", models_max=0)
    for ticket, model in enumerate("abc"):
        scheduler.request(ticket, model)
    assert effects.take() == ["start a", "start b", "start c"]


def test_a_failed_load_ends_everyone_who_waited_for_it_and_the_next_request_tries_again() -> None:
    scheduler, effects = herd_of("a")
    scheduler.request(1, "a")
    scheduler.request(2, "a")
    scheduler.exited("a", LoadFailed("no such file"))
    assert effects.take() == ["start a", "reject 1: no such file", "reject 2: no such file"]
    scheduler.request(3, "a")
    assert effects.take() == ["start a"]


def test_a_failed_load_gives_its_place_to_the_next_model() -> None:
    scheduler, effects = herd_of("a", "b")
    scheduler.request(1, "a")
    scheduler.request(2, "b")
    scheduler.exited("a", LoadFailed("bad"))
    assert effects.take() == ["start a", "reject 1: bad", "start b"]


def test_a_crash_forgets_what_was_granted_and_restarts_on_the_next_request() -> None:
    scheduler, effects = loaded("a")
    scheduler.request(1, "a")
    scheduler.exited("a")
    scheduler.finish(1)
    assert scheduler.in_flight("a") == 0
    scheduler.request(2, "a")
    assert effects.take() == ["grant 1", "start a"]


def test_a_request_that_only_wants_the_model_ready_does_not_hold_it() -> None:
    scheduler, effects = herd_of("a")
    scheduler.request(1, "a", holds=False)
    scheduler.ready("a")
    assert effects.take() == ["start a", "grant 1"]
    assert scheduler.in_flight("a") == 0


def test_a_cancelled_waiter_is_forgotten_and_a_granted_one_is_not_cancelled_here() -> None:
    scheduler, effects = loaded("a", "b")
    scheduler.request(1, "a")
    scheduler.request(2, "b")
    assert scheduler.cancel(2)
    assert not scheduler.cancel(1)
    scheduler.finish(1)
    assert effects.take() == ["grant 1"]


def test_a_request_during_a_stop_is_served_after_a_restart() -> None:
    scheduler, effects = loaded("a", "b")
    scheduler.request(1, "b")
    scheduler.cancel(1)
    scheduler.request(2, "a")
    scheduler.exited("a")
    assert effects.take() == ["stop a", "start a"]


def test_unloading_stops_even_a_busy_model_and_ends_who_waits_for_it() -> None:
    scheduler, effects = herd_of("a")
    scheduler.request(1, "a")
    assert scheduler.unload("a", WorkerFailed("unloaded"))
    assert effects.take() == ["start a", "reject 1: unloaded", "stop a"]
    assert not scheduler.unload("a", WorkerFailed("unloaded"))
    assert scheduler.phase("a") is Phase.STOPPING


def test_a_waiting_model_is_overtaken_a_bounded_number_of_times() -> None:
    scheduler, effects = loaded("a", "b", max_overtakes=3)
    scheduler.request(1, "a")
    scheduler.request(100, "b")
    for ticket in range(2, 10):
        scheduler.request(ticket, "a")
    assert effects.take() == ["grant 1", "grant 2", "grant 3", "grant 4"]
    for ticket in range(1, 5):
        scheduler.finish(ticket)
    assert effects.take() == ["stop a"]
    scheduler.exited("a")
    scheduler.ready("b")
    assert effects.take() == ["start b", "grant 100"]
    scheduler.finish(100)
    scheduler.exited("b")
    scheduler.ready("a")
    assert effects.take() == ["stop b", "start a", *(f"grant {ticket}" for ticket in range(5, 10))]


def test_a_drained_model_takes_requests_again_when_the_one_that_waited_leaves() -> None:
    scheduler, effects = loaded("a", "b", max_overtakes=1)
    scheduler.request(1, "a")
    scheduler.request(100, "b")
    scheduler.request(2, "a")
    scheduler.request(3, "a")
    assert effects.take() == ["grant 1", "grant 2"]
    scheduler.cancel(100)
    assert effects.take() == ["grant 3"]


def test_the_cores_are_divided_among_the_models_that_are_busy_now() -> None:
    effects = Recorder()
    scheduler = Scheduler(effects, Limits(models_max=0, cores=4))
    for ticket, model in enumerate("ab"):
        scheduler.add(model)
        scheduler.request(100 + ticket, model, holds=False)
        scheduler.ready(model)
    effects.take()
    scheduler.request(1, "a")
    scheduler.request(2, "a")
    scheduler.request(3, "b")
    assert effects.take() == ["threads a 4", "grant 1", "grant 2", "threads a 2", "threads b 2", "grant 3"]
    scheduler.finish(1)
    assert effects.take() == []
    scheduler.finish(3)
    assert effects.take() == ["threads a 4"]
    scheduler.exited("a")
    scheduler.request(4, "a")
    scheduler.ready("a")
    assert effects.take() == ["start a", "threads a 4", "grant 4"]


def test_a_model_can_be_added_once() -> None:
    scheduler, _ = herd_of("a")
    with pytest.raises(ValueError, match="exists"):
        scheduler.add("a")


def test_a_model_is_granted_as_many_requests_as_it_has_slots() -> None:
    scheduler, effects = herd_of()
    scheduler.add("a", slots=2)
    for ticket in (1, 2, 3, 4):
        scheduler.request(ticket, "a")
    scheduler.ready("a")
    assert effects.take() == ["start a", "grant 1", "grant 2"]
    scheduler.finish(2)
    scheduler.finish(1)
    assert effects.take() == ["grant 3", "grant 4"]


def test_a_request_of_higher_priority_goes_first_within_a_model_and_between_models() -> None:
    scheduler, effects = herd_of("b", "c")
    scheduler.add("a", slots=1)
    scheduler.request(1, "a")
    scheduler.ready("a")
    scheduler.request(2, "a")
    scheduler.request(3, "b")
    scheduler.request(4, "c", priority=5)
    scheduler.request(5, "a", priority=1)
    assert effects.take() == ["start a", "grant 1"]
    scheduler.finish(1)
    assert effects.take() == ["grant 5"]
    scheduler.finish(5)
    scheduler.finish(2)
    scheduler.exited("a")
    assert effects.take() == ["grant 2", "stop a", "start c"]


def test_a_pinned_model_is_never_stopped_for_room() -> None:
    effects = Recorder()
    scheduler = Scheduler(effects, Limits(models_max=2))
    scheduler.add("pinned", pinned=True)
    for model in "ab":
        scheduler.add(model)
    for ticket, model in enumerate(("pinned", "a")):
        scheduler.request(ticket, model, holds=False)
        scheduler.ready(model)
    scheduler.request(3, "a", holds=False)
    scheduler.request(4, "b")
    assert effects.take()[-1] == "stop a"


def test_a_model_for_which_pinned_ones_leave_no_room_is_refused_at_once() -> None:
    effects = Recorder()
    scheduler = Scheduler(effects, Limits(models_max=1))
    scheduler.add("pinned", pinned=True)
    scheduler.add("a")
    scheduler.request(1, "pinned")
    scheduler.request(2, "a")
    assert effects.take() == [
        "start pinned",
        "reject 2: model 'a' cannot be loaded: what pinned models hold leaves no room for it",
    ]


def test_a_sleeping_model_is_woken_by_a_request_and_not_evicted_while_it_wakes() -> None:
    scheduler, effects = loaded("a", "b")
    assert scheduler.asleep("a")
    scheduler.request(1, "a", holds=False)
    scheduler.request(2, "a")
    scheduler.request(3, "b")
    assert effects.take() == ["wake a"]
    scheduler.ready("a")
    assert effects.take() == ["grant 1", "grant 2"]


def test_a_sleeping_model_makes_room_like_any_idle_one_and_a_busy_one_does_not_sleep() -> None:
    scheduler, effects = loaded("a", "b")
    scheduler.request(1, "a")
    assert not scheduler.asleep("a")
    scheduler.finish(1)
    assert scheduler.asleep("a")
    assert not scheduler.asleep("a")
    scheduler.request(2, "b")
    assert effects.take() == ["grant 1", "stop a"]


def budgeted(**sizes: int) -> tuple[Scheduler, Recorder]:
    """A herd without a limit of places, on 10 MiB, whose models have the given sizes in MiB."""
    effects = Recorder()
    scheduler = Scheduler(effects, Limits(models_max=0, memory_budget=10 * MIB))
    for model, size in sizes.items():
        scheduler.add(model)
        scheduler.resize(model, size * MIB)
    return scheduler, effects


def serve(scheduler: Scheduler, *models: str) -> None:
    """Let each model serve one request, so that it is ready and idle."""
    for ticket, model in enumerate(models, start=1000):
        scheduler.request(ticket, model, holds=False)
        scheduler.ready(model)


def test_models_run_together_as_long_as_they_fit_the_budget() -> None:
    scheduler, effects = budgeted(a=5, b=5, c=1)
    for ticket, model in enumerate("abc"):
        scheduler.request(ticket, model)
    assert effects.take() == ["start a", "start b"]


def test_as_many_idle_models_go_as_the_new_one_needs_and_it_waits_for_their_exits() -> None:
    scheduler, effects = budgeted(a=3, b=3, c=3, big=7)
    serve(scheduler, "a", "b", "c")
    effects.take()
    scheduler.request(1, "big")
    assert effects.take() == ["stop a", "stop b"]
    scheduler.exited("a")
    assert effects.take() == []
    scheduler.exited("b")
    assert effects.take() == ["start big"]


def test_no_idle_model_is_stopped_in_vain() -> None:
    scheduler, effects = budgeted(a=3, b=6, big=7)
    serve(scheduler, "a")
    scheduler.request(1, "b")
    scheduler.ready("b")
    effects.take()
    scheduler.request(2, "big")
    assert effects.take() == []
    scheduler.finish(1)
    assert effects.take() == ["stop b"]  # with it gone, a and the new one fit


def test_only_what_is_in_the_way_is_stopped_and_not_what_was_merely_used_longer_ago() -> None:
    effects = Recorder()
    scheduler = Scheduler(effects, Limits(models_max=0, gpu_budgets=(10 * MIB, 10 * MIB)))
    for model, shares in {"a": (0, 9), "b": (5, 0), "c": (4, 1), "new": (3, 0)}.items():
        scheduler.add(model)
        scheduler.resize(model, 0, [tuple(share * MIB for share in shares)])
    serve(scheduler, "a", "b", "c")
    effects.take()
    scheduler.request(1, "new")
    assert effects.take() == ["stop b"]


def test_what_does_not_fit_a_gpu_is_refused_with_its_figures() -> None:
    effects = Recorder()
    scheduler = Scheduler(effects, Limits(memory_budget=2 * MIB, gpu_budgets=(9 * MIB, 3 * MIB)))
    scheduler.add("m")
    scheduler.resize("m", 3 * MIB, [(9 * MIB, 4 * MIB)])
    scheduler.request(1, "m")
    assert effects.take() == [
        "reject 1: model 'm' cannot be loaded: it needs about 3 MiB, and the memory budget is 2 MiB "
        "and it needs about 4 MiB of GPU 1, whose budget is 3 MiB"
    ]


def test_short_of_memory_the_idle_model_on_the_same_gpu_goes() -> None:
    effects = Recorder()
    scheduler = Scheduler(effects, Limits(models_max=0, gpu_budgets=(10 * MIB, 10 * MIB)))
    for model, shares in {"a": (0, 1), "b": (1, 0), "new": (1, 0)}.items():
        scheduler.add(model)
        scheduler.resize(model, 0, [tuple(share * MIB for share in shares)])
    serve(scheduler, "a", "b")
    scheduler.request(1, "new")
    effects.take()
    assert scheduler.exited("new", LoadFailed("memory"), short_of_memory=True)
    assert effects.take() == ["stop b"]
    scheduler.exited("b")
    assert effects.take() == ["start new"]
    assert not scheduler.exited("new", LoadFailed("memory"), short_of_memory=True)
    assert effects.take() == ["reject 1: memory"]


def test_who_left_while_room_was_made_for_a_second_try_holds_up_nobody_later() -> None:
    effects = Recorder()
    scheduler = Scheduler(effects, Limits(models_max=2))
    for model in ("a", "new", "other"):
        scheduler.add(model)
    serve(scheduler, "a")
    scheduler.request(1, "new")
    assert scheduler.exited("new", LoadFailed("memory"), short_of_memory=True)
    effects.take()
    scheduler.cancel(1)
    scheduler.exited("a")
    # What had made room is back, and stops for a reason of its own.
    scheduler.request(2, "a")
    scheduler.ready("a")
    scheduler.finish(2)
    scheduler.unload("a", WorkerFailed("unloaded"))
    effects.take()

    scheduler.request(3, "new")

    assert effects.take() == ["start new"]
    scheduler.exited("a")
    scheduler.ready("new")
    assert "grant 3" in " ".join(effects.take())


def test_what_does_not_fit_alone_is_refused_with_the_figures() -> None:
    scheduler, effects = budgeted(huge=11)
    scheduler.request(1, "huge")
    assert effects.take() == [
        "reject 1: model 'huge' cannot be loaded: it needs about 11 MiB, and the memory budget is 10 MiB"
    ]


def test_a_large_model_is_not_starved_by_small_ones_that_fit() -> None:
    effects = Recorder()
    scheduler = Scheduler(effects, Limits(models_max=0, memory_budget=10 * MIB, max_overtakes=2))
    for model, size in (("a", 4), ("b", 4), ("big", 9)):
        scheduler.add(model)
        scheduler.resize(model, size * MIB)
    scheduler.request(1, "a")
    scheduler.ready("a")
    scheduler.request(100, "big")
    scheduler.request(2, "b")
    scheduler.ready("b")
    for ticket in range(3, 9):
        scheduler.request(ticket, "ab"[ticket % 2])
    granted = [said for said in effects.take() if said.startswith("grant")]
    assert len(granted) <= 1 + 2 * 2
    for said in granted:
        scheduler.finish(int(said.split()[1]))
    assert effects.take() == ["stop a", "stop b"]
    scheduler.exited("a")
    scheduler.exited("b")
    assert effects.take() == ["start big"]


def test_a_measurement_replaces_the_estimate() -> None:
    scheduler, effects = budgeted(a=9, b=5)
    scheduler.request(1, "a")
    scheduler.ready("a")
    scheduler.request(2, "b")
    assert effects.take() == ["start a", "grant 1"]
    scheduler.measure("a", 4 * MIB)
    assert effects.take() == ["start b"]


def test_a_measurement_of_one_that_is_on_its_way_out_says_nothing_of_the_next() -> None:
    scheduler, effects = budgeted(a=9)
    scheduler.request(1, "a")
    scheduler.ready("a")
    scheduler.retire("a")
    scheduler.resize("a", 2 * MIB)
    scheduler.measure("a", 8 * MIB)
    assert scheduler.memory("a") == 8 * MIB
    scheduler.finish(1)
    scheduler.measure("a", 7 * MIB)
    assert scheduler.memory("a") == 7 * MIB
    scheduler.exited("a")
    assert scheduler.memory("a") == 2 * MIB
    assert effects.take() == ["start a", "grant 1", "stop a"]


def test_a_full_queue_refuses_with_the_figures() -> None:
    effects = Recorder()
    scheduler = Scheduler(effects, Limits(queue_max=3, queue_max_per_model=2))
    for model in "abc":
        scheduler.add(model)
    for ticket, model in enumerate("aaabb"):
        scheduler.request(ticket, model)
    assert effects.take() == [
        "start a",
        "reject 2: 2 requests wait for model 'a' already, and the limit is 2",
        "start b",
        "reject 4: 3 requests wait already, and the limit is 3",
    ]


# --- who takes a process over ---


def test_what_makes_room_is_stopped_for_the_model_that_wants_it() -> None:
    herd, effects = loaded("a", "b", "c")
    herd.request(1, "b")
    herd.request(2, "c")
    assert effects.heirs == {"a": "b"}
    herd.exited("a")
    herd.ready("b")
    herd.finish(1)
    assert effects.heirs == {"a": "b", "b": "c"}


def test_what_starts_beside_what_leaves_for_it_is_the_heir_too() -> None:
    effects = Recorder()
    herd = Scheduler(effects, Limits(models_max=1, memory_budget=100))
    for model in "ab":
        herd.add(model)
        herd.resize(model, 40)
    herd.request(1, "a")
    herd.ready("a")
    herd.finish(1)
    effects.take()
    herd.request(2, "b")
    assert effects.take() == ["stop a", "start b"]
    assert effects.heirs == {"a": "b"}


def test_what_is_stopped_for_another_reason_has_no_heir() -> None:
    herd, effects = loaded("a", "b", "c", models_max=3)
    herd.unload("a", WorkerFailed("unloaded"))
    herd.retire("b")
    herd.dismiss("c", 0)
    assert effects.take() == ["stop a", "stop b", "stop c"]
    assert effects.heirs == {}


def test_what_goes_for_a_load_that_found_too_little_memory_has_no_heir() -> None:
    herd, effects = loaded("a", "b", models_max=2)
    herd.unload("b", WorkerFailed("unloaded"))
    herd.exited("b")
    herd.request(1, "b")
    assert herd.exited("b", LoadFailed("memory"), short_of_memory=True)
    assert effects.take() == ["stop b", "start b", "stop a"]
    assert effects.heirs == {}


def test_a_worker_hears_of_its_threads_before_its_first_request_and_so_does_the_one_it_shares_with() -> None:
    effects = Recorder()
    scheduler = Scheduler(effects, Limits(models_max=0, cores=2))
    for ticket, model in enumerate("ab"):
        scheduler.add(model, slots=2)
        scheduler.request(100 + ticket, model, holds=False)
        scheduler.ready(model)
    scheduler.request(1, "a")
    effects.take()
    for ticket in (2, 3, 4):
        scheduler.request(ticket, "b")
    assert effects.take() == ["threads a 1", "threads b 1", "grant 2", "grant 3"]


def test_a_request_whose_process_died_goes_back_to_its_old_place_whatever_the_limit_of_the_queue() -> None:
    effects = Recorder()
    scheduler = Scheduler(effects, Limits(models_max=1, queue_max=2))
    scheduler.add("a", slots=2)
    for ticket in (1, 2):
        scheduler.request(ticket, "a")
    scheduler.ready("a")
    for ticket in (3, 4):
        scheduler.request(ticket, "a")
    effects.take()
    assert not scheduler.exited("a", again=(1, 2))
    assert [ticket for ticket, _ in scheduler.queue("a")] == [1, 2, 3, 4]
    scheduler.request(5, "a")
    scheduler.ready("a")
    said = effects.take()
    assert said[0] == "start a" and said[1].startswith("reject 5: 4 requests wait already")
    assert said[2:] == ["grant 1", "grant 2"]


def test_an_instance_that_is_held_is_not_stopped_for_room_nor_for_idleness_and_counts_as_used_then() -> None:
    scheduler, effects = loaded("a", "b", "c", models_max=2)
    scheduler.hold("a", 0)
    scheduler.dismiss("a", 0)
    assert effects.take() == []
    scheduler.request(1, "c")
    assert effects.take() == ["stop b"]
    scheduler.exited("b")
    assert effects.take() == ["start c"]
    scheduler.request(2, "b")
    assert effects.take() == []
    scheduler.let_go("a", 0)
    assert effects.take() == ["stop a"]


def test_an_instance_that_retires_while_it_is_held_finishes_first() -> None:
    scheduler, effects = loaded("a")
    scheduler.hold("a", 0)
    scheduler.hold("a", 0)
    scheduler.retire("a")
    scheduler.let_go("a", 0)
    assert effects.take() == []
    scheduler.let_go("a", 0)
    assert effects.take() == ["stop a"]


def test_one_that_wakes_while_it_is_held_and_retires_is_stopped_when_it_has_finished() -> None:
    scheduler, effects = loaded("a")
    scheduler.hold("a", 0)
    assert scheduler.asleep("a")
    scheduler.request(1, "a")
    scheduler.retire("a")
    assert effects.take() == ["wake a"]
    scheduler.ready("a")
    assert effects.take() == []
    scheduler.let_go("a", 0)
    assert effects.take() == ["stop a"]
    scheduler.exited("a")
    assert effects.take() == ["start a"]


def test_an_end_that_was_overtaken_by_the_exit_lets_nothing_go() -> None:
    scheduler, effects = loaded("a", "b")
    scheduler.hold("a", 0)
    scheduler.exited("a")
    scheduler.let_go("a", 0)
    scheduler.request(1, "a")
    scheduler.ready("a")
    scheduler.hold("a", 0)
    assert not scheduler.unused("a", 0)
    assert effects.take() == ["start a", "grant 1"]


class Scan(dict[str, Model]):
    """A scheduler's models, that count how often one looks at all of them."""

    def __init__(self, models: dict[str, Model]) -> None:
        super().__init__(models)
        self.scans = 0

    def values(self) -> Any:
        self.scans += 1
        return super().values()


def test_what_an_event_costs_does_not_grow_with_the_models() -> None:
    """No request, answer or departure looks at all models, not even while others wait for room."""
    scheduler, effects = loaded(*(f"m{number}" for number in range(30)), models_max=10)
    for ticket in range(10):
        scheduler.request(ticket, f"m{ticket}")
    for ticket in range(10, 20):
        scheduler.request(ticket, f"m{ticket}")  # these wait for room
    models = scheduler._models = Scan(scheduler._models)  # pyright: ignore[reportPrivateUsage]
    effects.take()
    for ticket in range(100, 115):  # one less than would drain one of them
        scheduler.request(ticket, "m3")
        scheduler.finish(ticket)
    assert scheduler.cancel(19)
    assert effects.take() == [f"grant {ticket}" for ticket in range(100, 115)]
    assert models.scans == 0


def calls_of_a_request(models: int) -> int:
    """Return how many calls the scheduler makes, of Python's and of C's functions, from a request to its end, with so
    many models about, half of which were used since.
    """
    names = [f"m{number}" for number in range(models)]
    scheduler, effects = loaded(*names, models_max=models)
    for ticket, name in enumerate([*names, *names[: models // 2]]):
        scheduler.request(ticket, name)
        scheduler.finish(ticket)
    effects.take()
    calls = 0

    def count(_frame: object, event: str, _of: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        scheduler.request(9_999, names[-1])
        scheduler.finish(9_999)
    finally:
        sys.setprofile(None)
    assert effects.take() == ["grant 9999"]
    return calls


def test_a_request_takes_as_many_calls_among_300_models_as_among_10() -> None:
    assert calls_of_a_request(300) == calls_of_a_request(10)
