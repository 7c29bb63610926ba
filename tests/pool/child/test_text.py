"""Text that streams: whole characters, and nothing of a stop string."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamaherd.pool.child.text import StopFinder, TextStream

#: Few letters, so that stop strings overlap themselves, each other and the text.
LETTERS = st.text(alphabet="abé😀", max_size=30)
STOPS = st.lists(st.text(alphabet="abé😀", min_size=1, max_size=5), max_size=4)


def edges(length: int, places: list[int]) -> list[tuple[int, int]]:
    cuts = [0, *sorted(place % (length + 1) for place in places), length]
    return list(itertools.pairwise(cuts))


def cut(data: bytes, places: list[int]) -> list[bytes]:
    return [data[start:end] for start, end in edges(len(data), places)]


def stream(pieces: list[bytes], stops: list[str]) -> tuple[str, str]:
    text = TextStream(stops)
    shown = ""
    for piece in pieces:
        shown += text.feed(piece)
        if text.stopping_word:
            return shown, text.stopping_word
    return shown + text.flush(), ""


def expected(text: str, stops: list[str]) -> tuple[str, str]:
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, ""


@given(LETTERS, STOPS, st.lists(st.integers(0, 200), max_size=12))
def test_the_result_does_not_depend_on_how_the_bytes_are_cut(text: str, stops: list[str], places: list[int]) -> None:
    assert stream(cut(text.encode(), places), stops) == expected(text, stops)


@given(LETTERS, st.lists(st.integers(0, 200), max_size=20))
def test_no_part_shown_ever_holds_half_a_character(text: str, places: list[int]) -> None:
    shown = TextStream()
    parts = [shown.feed(piece) for piece in cut(text.encode(), places)]
    assert "\ufffd" not in "".join(parts)
    assert "".join(parts) == text


@given(st.binary(max_size=40), st.lists(st.integers(0, 200), max_size=12))
def test_bytes_that_are_no_text_become_replacement_characters(data: bytes, places: list[int]) -> None:
    whole = TextStream().feed(data)
    text = TextStream()
    assert "".join(text.feed(piece) for piece in cut(data, places)) == whole
    assert data.decode("utf-8", "replace").startswith(whole)


@given(LETTERS, STOPS, st.lists(st.integers(0, 200), max_size=12))
def test_what_was_shown_is_never_taken_back(text: str, stops: list[str], places: list[int]) -> None:
    finder = StopFinder(stops)
    shown = ""
    for start, end in edges(len(text), places):
        shown += finder.feed(text[start:end])
        assert expected(text, stops)[0].startswith(shown)
        if finder.found:
            break


def test_of_two_stop_strings_complete_at_once_the_longer_counts() -> None:
    assert stream([b"xxab"], ["b", "ab"]) == ("xx", "ab")


def test_the_stop_string_that_is_complete_first_counts() -> None:
    assert stream([b"xabcd"], ["abcd", "bc"]) == ("xa", "bc")


def test_empty_stop_strings_stop_nothing() -> None:
    assert stream([b"hello"], ["", ""]) == ("hello", "")


def test_an_unfinished_character_at_the_end_is_dropped() -> None:
    assert stream(["né😀".encode()[:-1]], []) == ("né", "")


@pytest.mark.parametrize("stop", ["\n\n", "User:", "é!"])
def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_decided(stop: str) -> None:
    finder = StopFinder([stop])
    assert finder.feed("x" + stop[:-1]) == "x"
    assert finder.feed("?") == stop[:-1] + "?"
