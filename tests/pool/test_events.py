"""Every listener sees a snapshot, then every change; one that lags sees a new snapshot instead of a growing backlog."""

import asyncio
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from herding import run
from llamaherd.pool.events import MAX_BACKLOG, EventLog


def log_of(state: dict[str, Any]) -> EventLog:
    return EventLog(lambda: dict(state))


def test_a_snapshot_is_taken_when_it_is_read_and_numbered_by_the_last_change_in_it() -> None:
    async def scene() -> None:
        state = {"n": 0}
        log = log_of(state)
        events = log.subscribe()
        state["n"] = 1
        log.emit("m", "status_change", {"n": 1})
        first = await anext(events)
        assert (first.event, first.seq, first.data) == ("snapshot", 1, {"n": 1})
        log.emit("m", "status_change", {"n": 2})
        assert (await anext(events)).seq == 2

    run(scene())


def test_a_listener_that_lags_is_given_the_present_instead_of_the_past() -> None:
    async def scene() -> None:
        state = {"n": 0}
        log = log_of(state)
        events = log.subscribe()
        await anext(events)
        for number in range(MAX_BACKLOG + 1):
            state["n"] = number
            log.emit("m", "status_change", {"n": number})
        caught_up = await anext(events)
        assert (caught_up.event, caught_up.seq) == ("snapshot", MAX_BACKLOG + 1)
        log.emit("m", "status_change", {})
        assert (await anext(events)).seq == MAX_BACKLOG + 2

    run(scene())


def test_one_listener_that_lags_does_not_disturb_another() -> None:
    async def scene() -> None:
        log = log_of({})
        slow, quick = log.subscribe(), log.subscribe()
        await anext(slow)
        await anext(quick)
        for number in range(MAX_BACKLOG + 10):
            log.emit("m", "status_change", {})
            assert (await anext(quick)).seq == number + 1

    run(scene())


def test_closing_a_subscription_ends_its_reader() -> None:
    async def scene() -> None:
        log = log_of({})
        events = log.subscribe()
        await anext(events)
        reading = asyncio.ensure_future(anext(events, None))
        await asyncio.sleep(0)
        await events.aclose()
        assert await reading is None

    run(scene())


def test_the_end_of_the_log_comes_after_what_was_not_read_yet() -> None:
    async def scene() -> None:
        log = log_of({})
        events = log.subscribe()
        await anext(events)
        log.emit("m", "status_change", {})
        log.close()
        assert [event.seq async for event in events] == [1]

    run(scene())


@given(emitted=st.integers(0, MAX_BACKLOG + 50), since=st.integers(-3, MAX_BACKLOG + 60))
def test_who_comes_back_gets_all_that_was_missed_or_a_snapshot(emitted: int, since: int) -> None:
    async def scene() -> None:
        log = log_of({})
        for _ in range(emitted):
            log.emit("m", "status_change", {})
        events = log.subscribe(since)
        log.emit("m", "status_change", {})
        first = await anext(events)
        if max(0, emitted - MAX_BACKLOG) <= since <= emitted:
            assert (first.event, first.seq) == ("status_change", since + 1)
        else:
            assert (first.event, first.seq) == ("snapshot", emitted + 1)

    run(scene())
