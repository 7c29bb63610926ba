"""A client that does not read costs the server no memory for each token, delays nobody, and loses nothing."""

import re

import psutil

from live_front import LiveFront, fake, say

CHAT = "/v1/chat/completions"
TOKENS = 300_000
#: Each token kept as an object of its own would take more than twice that.
ALLOWED_BYTES = 40_000_000
EVENT = re.compile(rb'"content":"([^"]*)"')


def test_an_unread_stream_is_bounded_disturbs_nobody_and_loses_nothing() -> None:
    talker = fake("talker", pieces=("word ",), repeat=TOKENS)
    with LiveFront(talker, fake("echo")) as front, front.client() as client:
        for model in ("talker", "echo"):
            client.post(CHAT, json=say("hello", model=model, max_tokens=1))
        process = psutil.Process()
        before = process.memory_info().rss
        with front.raw(CHAT, say("hi", model="talker", stream=True)) as unread:
            unread.read_until(b"word")
            answers = [client.post(CHAT, json=say("hello", model="echo")).json() for _ in range(20)]
            # The worker ends only because nobody waits for the reader.
            front.wait_for_requests("talker", 0)
            grown = process.memory_info().rss - before
            received = unread.read_until(b"[DONE]")
    assert {answer["choices"][0]["message"]["content"] for answer in answers} == {"hello"}
    assert grown < ALLOWED_BYTES
    assert sum(text.count(b"word ") for text in EVENT.findall(received)) == TOKENS
