"""Forms are taken apart as clients put them together, and what is none is refused."""

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamaherd.http.form import MOST_FIELDS, parse_form, texts_of
from llamaherd.http.problems import Problem

TYPE = "multipart/form-data; boundary=xx"
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs"), exclude_characters='"\\%;'), min_size=1)


@given(st.dictionaries(NAMES, st.binary(), min_size=1, max_size=8), st.binary(max_size=3000))
def test_what_a_client_puts_together_is_taken_apart(fields: dict[str, bytes], file: bytes) -> None:
    fields = {"file": file, **fields}
    request = httpx2.Request("POST", "http://x", files={name: ("a.bin", value) for name, value in fields.items()})
    assert parse_form(request.headers["content-type"], request.read()) == fields


@given(st.text(max_size=40), st.binary(max_size=200))
def test_whatever_comes_is_a_form_or_a_problem(content_type: str, body: bytes) -> None:
    for kind in (content_type, TYPE):
        try:
            assert parse_form(kind, body) is not None
        except Problem as problem:
            assert problem.kind.status == 400


def test_it_is_lenient_where_the_standard_is() -> None:
    head = b'content-disposition: form-data; name=a; filename="x"\r\nContent-Type: audio/wav'
    body = b"preamble\r\n--xx  \r\n" + head + b"\r\n\r\none\r\n\r\n--x\r\n--xx--\r\nepilogue"
    assert parse_form('Multipart/Form-Data; charset=utf-8; boundary="xx"', body) == {"a": b"one\r\n\r\n--x"}


def field(name: str, value: str = "1") -> bytes:
    return f'--xx\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()


@pytest.mark.parametrize(
    ("content_type", "body", "said"),
    [
        ("", field("a") + b"--xx--", "must be a form"),
        ("multipart/form-data", field("a") + b"--xx--", "must be a form"),
        ("application/json; boundary=xx", field("a") + b"--xx--", "must be a form"),
        (TYPE, b"", "no end"),
        (TYPE, field("a"), "no end"),
        (TYPE, b"--xx\r\n\r\n1\r\n--xx--", "no name"),
        (TYPE, b"--xx\r\nContent-Disposition: form-data\r\n\r\n1\r\n--xx--", "no name"),
        (TYPE, b'--xx\r\nContent-Disposition: file; name="a"\r\n\r\n1\r\n--xx--', "no name"),
        (TYPE, b"--xx\r\nContent-Disposition: form-data\r\n--xx--", "no head"),
        (TYPE, b"--xxyy\r\n\r\n1\r\n--xx--", "no head"),
        (TYPE, field("a") * (MOST_FIELDS + 1) + b"--xx--", f"more than {MOST_FIELDS}"),
    ],
)
def test_what_is_damaged_is_refused(content_type: str, body: bytes, said: str) -> None:
    with pytest.raises(Problem, match=said):
        parse_form(content_type, body)


def test_as_many_fields_as_are_allowed_are() -> None:
    body = b"".join(field(str(number)) for number in range(MOST_FIELDS)) + b"--xx--"
    assert len(parse_form(TYPE, body)) == MOST_FIELDS


def test_a_text_that_is_none_is_named() -> None:
    assert texts_of({"a": "é".encode()}) == {"a": "é"}
    with pytest.raises(Problem, match="prompt: "):
        texts_of({"prompt": b"\xff"})
