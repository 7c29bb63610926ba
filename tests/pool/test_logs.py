"""A log ring keeps the last lines, whole, and no more than its bounds."""

from hypothesis import given, settings
from hypothesis import strategies as st

from llamaherd.pool.logs import MAX_LINE_BYTES, MAX_LINES, LogRing


@given(st.lists(st.binary(max_size=50), max_size=40))
@settings(deadline=None, derandomize=True)
def test_lines_come_out_whole_however_they_arrive(chunks: list[bytes]) -> None:
    ring = LogRing()
    for chunk in chunks:
        ring.feed(chunk)
    expected = b"".join(chunks).split(b"\n")
    if not expected[-1]:
        expected.pop()
    assert ring.tail() == tuple(line.decode(errors="replace") for line in expected)


def test_a_flood_of_lines_keeps_the_last_ones() -> None:
    ring = LogRing()
    ring.feed(b"".join(b"%d\n" % number for number in range(5 * MAX_LINES)))
    assert len(ring.tail()) == MAX_LINES
    assert ring.tail(1) == (str(5 * MAX_LINES - 1),)


def test_a_flood_without_a_newline_is_bounded() -> None:
    ring = LogRing()
    for _ in range(300):
        ring.feed(b"." * 65536)
    assert sum(len(line) for line in ring.tail()) <= (MAX_LINES + 1) * MAX_LINE_BYTES
    assert max(len(line) for line in ring.tail()) <= MAX_LINE_BYTES


def test_one_enormous_line_is_bounded() -> None:
    ring = LogRing()
    ring.feed(b"x" * (3 * MAX_LINES * MAX_LINE_BYTES) + b"\nlast")
    ring.end_line()
    assert ring.tail(1) == ("last",)
    assert len(ring.tail()) <= MAX_LINES
