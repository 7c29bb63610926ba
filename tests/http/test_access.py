"""The access log tells of every request, and of nothing that was said in it."""

import logging

import httpx2
import pytest

from live_front import DEADLINE, LiveFront, fake, say


def test_a_line_tells_what_was_asked_and_how_it_ended_and_not_what_was_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="llamaherd.access")
    with LiveFront(fake("echo"), access_log=True) as front, front.client() as client:
        client.post("/v1/chat/completions?secret=query", json=say("secret prompt", model="echo", stream=True))
        client.get("/no/such/route", headers={"X-Api-Key": "secret key"})
    lines = [record.getMessage().split() for record in caplog.records if record.name == "llamaherd.access"]
    # A line comes when its request has been cleaned up, which the next one need not wait for.
    assert sorted(line[:4] for line in lines) == [
        ["127.0.0.1", "GET", "/no/such/route", "404"],
        ["127.0.0.1", "POST", "/v1/chat/completions", "200"],
    ]
    assert all(int(line[4]) > 0 and float(line[5]) >= 0 for line in lines)
    assert "secret" not in caplog.text


def test_without_it_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="llamaherd.access")
    with LiveFront(fake("echo")) as front:
        httpx2.get(f"{front.url}/health", timeout=DEADLINE)
    assert [record for record in caplog.records if record.name == "llamaherd.access"] == []


def test_a_path_cannot_write_lines_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="llamaherd.access")
    with LiveFront(fake("echo"), access_log=True) as front:
        httpx2.get(f"{front.url}/no%0A127.0.0.1%20GET%20/forged%1B", timeout=DEADLINE)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "llamaherd.access"]
    assert line.split()[:4] == ["127.0.0.1", "GET", "/no%0A127.0.0.1%20GET%20/forged%1B", "404"]
