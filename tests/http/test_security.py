"""Keys, origins and host names: the policy by itself."""

from pathlib import Path

import pytest

from llamaherd.http.grants import Grant
from llamaherd.http.security import ApiKeys, Cors, Security, host_of, read_keys


def test_without_keys_everybody_may_enter() -> None:
    assert ApiKeys().admit(b"")
    assert ApiKeys([""]).admit(b"")


@pytest.mark.parametrize("given", [b"alpha", b"Bearer alpha", b"Bearer  alpha ", b"beta", "schlüssel".encode()])
def test_every_key_opens_with_and_without_its_scheme(given: bytes) -> None:
    assert ApiKeys(["alpha", "beta", "schlüssel"]).admit(given)


@pytest.mark.parametrize("given", [b"", b"Bearer ", b"Bearer", b"alph", b"alphaa", b"ALPHA", b"Basic alpha"])
def test_anything_else_opens_nothing(given: bytes) -> None:
    assert not ApiKeys(["alpha", "beta"]).admit(given)


def test_no_repr_shows_a_key() -> None:
    policy = Security(keys=ApiKeys(["secret"]))
    assert "secret" not in repr(policy)
    assert "secret" not in str(vars(policy.keys))


def test_a_key_file_has_keys_and_comments(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_bytes(b"# ours\nalpha\r\n\n  beta  \n#gamma\n")
    assert read_keys(file) == {"alpha": Grant(), "beta": Grant()}


def test_a_key_file_says_what_its_keys_open(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("alpha read-only\nbeta models=one,two\ngamma  models=one read-only models=two\n")
    assert read_keys(file) == {
        "alpha": Grant(read_only=True),
        "beta": Grant(models=frozenset({"one", "two"})),
        "gamma": Grant(models=frozenset({"one", "two"}), read_only=True),
    }


@pytest.mark.parametrize("words", ["readonly", "models=", "models", "a key"])
def test_a_word_that_means_nothing_after_a_key_is_an_error(tmp_path: Path, words: str) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\nalpha {words}\n")
    with pytest.raises(ValueError, match="line 2: after a key"):
        read_keys(file)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "holds no API key"), (b"# only\n\n", "holds no API key"), (b"\xff", "not UTF-8"), (b"k" * 2**21, "is over")],
)
def test_a_key_file_without_keys_is_an_error_and_not_an_open_door(tmp_path: Path, content: bytes, reason: str) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        read_keys(file)


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("http://localhost", True),
        ("http://localhost:5173", True),
        ("https://127.0.0.1:8443", True),
        ("http://[::1]:3000", True),
        ("http://127.9.9.9", True),
        ("https://example.org", False),
        ("http://localhost.example.org", False),
        ("http://127.0.0.1.example.org", False),
        ("http://[::1", False),
        ("null", False),
        ("", False),
    ],
)
def test_where_no_key_is_needed_only_pages_of_this_machine_may_ask(origin: str, allowed: bool) -> None:
    assert Security().allows(origin) is allowed
    assert Security(keys=ApiKeys(["k"])).allows(origin)


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [("https://Example.org", True), ("https://example.org/", True), ("http://example.org", False), ("null", False)],
)
def test_origins_can_be_listed(origin: str, allowed: bool) -> None:
    policy = Security(keys=ApiKeys(["k"]), cors=Cors(origins=("https://other.example", "https://example.org")))
    assert policy.allows(origin) is allowed


@pytest.mark.parametrize(
    ("header", "host"),
    [("LocalHost:80", "localhost"), ("[::1]:8080", "::1"), ("[::1", ""), ("", ""), ("a.b:x", "a.b"), ("x@y:1", "y")],
)
def test_a_host_header_is_read_without_its_port(header: str, host: str) -> None:
    assert host_of(header) == host


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("localhost:8080", True),
        ("127.0.0.1", True),
        ("[::1]:1", True),
        ("[::ffff:127.0.0.1]", True),
        ("Box.example:9", True),
        ("own.example", True),
        ("evil.example:8080", False),
        ("localhost.evil.example", False),
        ("", False),
    ],
)
def test_the_server_answers_to_its_own_names(host: str, known: bool) -> None:
    policy = Security(allowed_hosts=("box.example",), own_names=("own.example",))
    assert policy.answers_to(host) is known
    assert Security(allowed_hosts=("*",)).answers_to(host)
