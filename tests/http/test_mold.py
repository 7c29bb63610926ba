"""An event from a mold is the event that encoding it anew would give."""

from hypothesis import given
from hypothesis import strategies as st

from llamaherd.http.chat import ChatAnswer
from llamaherd.http.completions import TextAnswer
from llamaherd.http.mold import Mold
from llamaherd.http.sse import frame
from llamaherd.pool import Piece

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@given(TEXT, TEXT)
def test_a_text_is_all_that_differs(name: str, text: str) -> None:
    mold = Mold(lambda gap: frame({"name": name, "choices": [{"text": gap}]}))
    assert mold.fill(text) == frame({"name": name, "choices": [{"text": text}]})


@given(TEXT, TEXT, st.integers(0, 15), st.booleans())
def test_pieces_have_the_same_frames_from_a_mold(model: str, text: str, index: int, reasons: bool) -> None:
    chat, plain = ChatAnswer(model), TextAnswer(model)
    piece = Piece(reasoning=text) if reasons else Piece(text=text)
    assert chat.frames(index, piece) == b"".join(map(chat.frame, chat.middle(index, piece)))
    assert plain.frames(index, piece) == b"".join(map(plain.frame, plain.middle(index, piece)))
