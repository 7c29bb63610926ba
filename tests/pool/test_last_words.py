"""What is made of the last lines of a worker that died."""

import signal

import pytest

from llamaherd.pool.last_words import explain_signal, last_words

ASSERTION = "llama-vocab.cpp:2544: GGML_ASSERT(id_to_token.size() == token_to_id.size()) failed"


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ([], ""),
        (["loading", "print_info: file size = 0.53 MiB"], ""),
        (["loading", f"/build/vendor/llama.cpp/src/{ASSERTION}"], ASSERTION),
        ([f"C:\\build\\src\\{ASSERTION}"], ASSERTION),
        ([ASSERTION, "a later line"], ASSERTION),
        (["/x/ggml.c:7: fatal error"], "ggml.c:7: fatal error"),
        (
            ["terminate called after throwing an instance of 'std::regex_error'", "  what():  Unmatched ( in regex."],
            "std::regex_error: Unmatched ( in regex.",
        ),
        (["terminate called after throwing an instance of 'int'"], "int"),
        (["terminate called without an active exception"], "terminate called without an active exception"),
        (["double free or corruption (out)"], "double free or corruption (out)"),
        (["*** stack smashing detected ***: terminated"], "*** stack smashing detected ***: terminated"),
        (["/old/a.cpp:1: GGML_ASSERT(old)", "/new/b.cpp:2: GGML_ASSERT(new)"], "b.cpp:2: GGML_ASSERT(new)"),
    ],
)
def test_the_newest_words_that_say_why_are_found(log: list[str], words: str) -> None:
    assert last_words(log) == words


def test_only_an_abort_has_last_words() -> None:
    log = [f"/build/{ASSERTION}"]
    assert explain_signal(signal.SIGABRT, log) == ASSERTION
    assert explain_signal(signal.SIGKILL, log) == ""
    assert "--no-mmap" in explain_signal(signal.SIGBUS, log)
    assert "processor" in explain_signal(signal.SIGILL, [])
