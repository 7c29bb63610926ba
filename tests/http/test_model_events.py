"""``/models/sse``: the present first, then every change, in the reference's words."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from live_front import LiveFront, fake, say
from llamaherd.http.front import MAX_LISTENERS


class Listener:
    """Reads ``/models/sse``, event by event."""

    def __init__(self, response: httpx2.Response) -> None:
        assert response.headers["content-type"] == "text/event-stream"
        self._lines: Iterator[str] = response.iter_lines()
        self.numbers: list[int] = []

    def next(self) -> dict[str, Any]:
        """Return the next event."""
        for line in self._lines:
            if line.startswith("id: "):
                self.numbers.append(int(line.removeprefix("id: ")))
            if line.startswith("data: "):
                event: dict[str, Any] = json.loads(line.removeprefix("data: "))
                return event
        raise AssertionError("the stream ended")

    def rest(self) -> list[str]:
        """Return what comes until the stream ends in order."""
        return list(self._lines)

    def until(self, status: str) -> list[dict[str, Any]]:
        """Return the events up to the one with this status."""
        events = [self.next()]
        while events[-1].get("data", {}).get("status") != status:
            events.append(self.next())
        return events


def test_the_first_event_is_the_present() -> None:
    with LiveFront(fake("echo")) as front, front.client() as client, client.stream("GET", "/models/sse") as response:
        event = Listener(response).next()
    assert (event["model"], event["event"]) == ("*", "snapshot")
    assert [model["name"] for model in event["data"]["models"]] == ["echo"]


def test_a_load_and_an_unload_are_told_in_order() -> None:
    with LiveFront(fake("echo")) as front, front.client() as client, client.stream("GET", "/models/sse") as response:
        listener = Listener(response)
        listener.next()
        client.post("/models/load", json={"model": "echo"})
        first, *middle, last = listener.until("loaded")
        client.post("/models/unload", json={"model": "echo"})
        gone = listener.until("unloaded")[-1]
    assert first == {"model": "echo", "event": "model_status", "data": {"status": "loading"}}
    assert {event["event"] for event in middle} == {"status_change"}
    values = [event["data"]["progress"]["value"] for event in middle]
    assert values == sorted(values)
    assert last["data"]["info"]["meta"]["n_vocab"] == 256
    assert gone == {"model": "echo", "event": "status_change", "data": {"status": "unloaded", "exit_code": 0}}
    assert listener.numbers == list(range(listener.numbers[0], listener.numbers[-1] + 1))


def test_listening_wakes_nothing_and_others_loads_are_heard() -> None:
    with LiveFront(fake("echo")) as front, front.client() as client, client.stream("GET", "/models/sse") as response:
        listener = Listener(response)
        listener.next()
        assert front.ask(lambda pool: pool.status("echo").pid) is None
        client.post("/v1/chat/completions", json=say("hi", model="echo"))
        assert listener.until("loaded")[-1]["model"] == "echo"


def test_silence_is_filled_with_comments(tmp_path: Path) -> None:
    with (
        LiveFront(fake("echo"), event_ping=0.01) as front,
        front.client() as client,
        client.stream("GET", "/models/sse") as response,
    ):
        lines = response.iter_lines()
        assert any(line == ":" for line in lines)


def test_the_number_of_listeners_is_bounded() -> None:
    with LiveFront(fake("echo")) as front, front.client() as client:
        front.fill_listeners(MAX_LISTENERS)
        response = client.get("/models/sse")
        assert response.status_code == 503
        assert response.headers["retry-after"]
        assert client.get("/models").status_code == 200


def test_a_shutdown_hangs_up_on_listeners() -> None:
    with LiveFront(fake("echo")) as front, front.client() as client, client.stream("GET", "/models/sse") as response:
        listener = Listener(response)
        listener.next()
        front.shut_down()
        assert "".join(listener.rest()) == ""


def test_a_client_that_comes_back_gets_what_it_has_missed_and_no_snapshot() -> None:
    with LiveFront(fake("echo")) as front, front.client() as client:
        with client.stream("GET", "/models/sse") as response:
            listener = Listener(response)
            listener.next()
            client.post("/models/load", json={"model": "echo"})
            listener.until("loaded")
        known = listener.numbers[-1]
        client.post("/models/unload", json={"model": "echo"})
        front.wait_for_state("echo", "unloaded")
        with client.stream("GET", "/models/sse", headers={"Last-Event-ID": str(known)}) as response:
            again = Listener(response)
            event = again.next()
    assert event["data"]["status"] == "unloaded"
    assert again.numbers == [known + 1]


@pytest.mark.parametrize("last", ["0", "5", "9" * 18, "9" * 500, "nonsense", "-1"])
def test_an_id_that_is_none_of_this_servers_is_answered_with_a_snapshot(last: str) -> None:
    with (
        LiveFront(fake("echo")) as front,
        front.client() as client,
        client.stream("GET", "/models/sse", headers={"Last-Event-ID": last}) as response,
    ):
        event = Listener(response).next()
    assert event["event"] == "snapshot"
