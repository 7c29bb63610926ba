"""Lines that end an answer: one that is not indented enough, and a line break after the time is over."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamaherd.pool.child.lines import LineLimits


def said(limits: LineLimits, *texts: str, elapsed: float = 0.0) -> tuple[str, bool]:
    """Return all that belongs to an answer in pieces, and whether it ended."""
    whole = ""
    for text in texts:
        kept, ends = limits.feed(text, elapsed)
        whole += kept
        if ends:
            return whole, True
    return whole, False


@pytest.mark.parametrize(
    ("text", "kept", "ends"),
    [
        ("first\n  second\n  third", "first\n  second\n  third", False),
        ("first\n  second\nthird", "first\n  second\n", True),
        ("first\n  second\n third", "first\n  second\n ", True),
        ("first\n  second\n\n  fourth", "first\n  second\n", True),
        ("first\n\t\tsecond", "first\n\t\tsecond", False),
        ("no blanks here", "no blanks here", False),
        ("first\n ", "first\n ", False),
        ("\nx", "\n", True),
    ],
)
def test_a_line_with_too_few_blanks_is_no_part_of_the_answer(text: str, kept: str, ends: bool) -> None:
    assert said(LineLimits(2, 0), text) == (kept, ends)


@given(st.text(alphabet="ab \t\n", max_size=30), st.lists(st.integers(0, 30)), st.integers(1, 3))
def test_it_does_not_matter_how_a_text_is_cut(text: str, cuts: list[int], least: int) -> None:
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[start:end] for start, end in zip(places, places[1:], strict=False)]
    assert said(LineLimits(least, 0), *pieces) == said(LineLimits(least, 0), text)


@pytest.mark.parametrize(
    ("limits", "elapsed", "text", "ends"),
    [
        (LineLimits(0, 1.0), 0.9, "a\n", False),
        (LineLimits(0, 1.0), 1.1, "a", False),
        (LineLimits(0, 1.0), 1.1, "a\nb", True),
        (LineLimits(0, 0.0), 9.9, "a\nb", False),
        (LineLimits(0, -1.0), 9.9, "a\nb", False),
    ],
)
def test_a_line_break_ends_an_answer_that_has_taken_long(
    limits: LineLimits, elapsed: float, text: str, ends: bool
) -> None:
    assert limits.feed(text, elapsed) == (text, ends)
