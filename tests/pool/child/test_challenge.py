"""What a registry asks for with a 401: the headers of real ones, odd ones, and anything at all."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamaherd.pool.child.challenge import BearerChallenge, parse_challenge

HUB = 'Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:ai/smollm2:pull"'


@pytest.mark.parametrize(
    ("header", "challenge"),
    [
        (HUB, BearerChallenge("https://auth.docker.io/token", "registry.docker.io", "repository:ai/smollm2:pull")),
        ('bearer realm="https://ghcr.io/token"', BearerChallenge("https://ghcr.io/token")),
        ('Bearer  realm = "a" , error="invalid_token", service=b', BearerChallenge("a", "b")),
        ('Bearer SCOPE="x,y z",realm="a\\"b"', BearerChallenge('a"b', "", "x,y z")),
        ('Bearer realm="a",realm="b"', BearerChallenge("a")),
        ('Bearer realm="a', None),
        ("Bearer", None),
        ('Basic realm="a"', None),
        ("", None),
        ('Bearer service="b"', None),
        ('Bearer realm="' + "a" * 10_000 + '"', None),
    ],
)
def test_a_header_says_where_a_token_is_to_be_had(header: str, challenge: BearerChallenge | None) -> None:
    assert parse_challenge(header) == challenge


@given(st.one_of(st.text(), st.text().map("Bearer {}".format), st.from_regex(r"Bearer (\w+=\"[^\"]*\",?)*")))
def test_no_header_breaks_the_reader(header: str) -> None:
    found = parse_challenge(header)

    assert found is None or found.realm
