"""Large answers go out in parts, between which others are served."""

import asyncio
import threading
from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from live_front import LiveFront, fake
from llamaherd.http.parts import PART_BYTES, in_parts


@given(st.lists(st.sampled_from([b"", b"a", b"bc" * 100, b"d" * (PART_BYTES // 3), b"e" * PART_BYTES])))
def test_parts_are_together_what_the_fragments_are(fragments: list[bytes]) -> None:
    parts = asyncio.run(in_parts(fragments))

    assert b"".join(parts) == b"".join(fragments)
    assert all(PART_BYTES <= len(part) < 2 * PART_BYTES for part in list(parts)[:-1])


def test_others_have_the_loop_after_each_part() -> None:
    told: list[str] = []

    def fragments() -> Iterator[bytes]:
        for number in range(3):
            told.append(f"part {number}")
            yield bytes(PART_BYTES)

    async def other() -> None:
        while len(told) < 6:
            told.append("other")
            await asyncio.sleep(0)

    async def scene() -> None:
        await asyncio.gather(in_parts(fragments()), other())

    asyncio.run(scene())
    assert told == ["part 0", "other", "part 1", "other", "part 2", "other"]


def test_another_client_is_answered_in_the_middle_of_a_large_answer() -> None:
    answered = threading.Event()
    part = bytes(PART_BYTES)

    def fragments() -> Iterator[bytes]:
        while not answered.is_set():
            yield part

    with LiveFront(fake("m")) as front, front.client() as client:
        front.start(lambda _: in_parts(fragments()))
        try:
            assert client.get("/health").status_code == 200
        finally:
            answered.set()
