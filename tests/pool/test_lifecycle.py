"""The lifecycle is a table, and a missing entry is the error."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamaherd.pool.lifecycle import RUNNING, TRANSITIONS, IllegalTransition, State, Trigger, transition


def test_every_state_has_a_row_and_every_row_leads_to_a_state() -> None:
    assert set(TRANSITIONS) == set(State)
    assert {target for moves in TRANSITIONS.values() for target in moves.values()} <= set(State)


def test_a_process_can_end_in_every_state_that_has_one_and_always_leaves_the_model_unloaded() -> None:
    assert frozenset(State) - {State.UNLOADED} == RUNNING
    assert all(TRANSITIONS[state][Trigger.EXIT] is State.UNLOADED for state in RUNNING)


def test_nothing_but_the_exit_leads_out_of_stopping() -> None:
    assert set(TRANSITIONS[State.STOPPING]) == {Trigger.EXIT}


@pytest.mark.parametrize(("state", "trigger"), list(itertools.product(State, Trigger)))
def test_the_table_alone_decides(state: State, trigger: Trigger) -> None:
    if trigger in TRANSITIONS[state]:
        assert transition(state, trigger) is TRANSITIONS[state][trigger]
    else:
        with pytest.raises(IllegalTransition, match=f"{state} cannot {trigger}"):
            transition(state, trigger)


def test_the_usual_life_of_a_model() -> None:
    state = State.UNLOADED
    lived: list[str] = []
    for trigger in ("spawn", "progress", "ready", "sleep", "progress", "ready", "stop", "exit"):
        state = transition(state, Trigger(trigger))
        lived.append(state.value)
    assert lived == ["loading", "loading", "loaded", "sleeping", "loading", "loaded", "stopping", "unloaded"]


@given(st.lists(st.sampled_from(Trigger), max_size=30))
@settings(deadline=None, derandomize=True)
def test_a_spawn_is_only_possible_without_a_process(triggers: list[Trigger]) -> None:
    state = State.UNLOADED
    for trigger in triggers:
        before = state
        try:
            state = transition(state, trigger)
        except IllegalTransition:
            continue
        assert trigger is not Trigger.SPAWN or before not in RUNNING
