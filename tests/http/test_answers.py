"""What the answers of all APIs tell in the same way."""

import pytest

from llamaherd.http.answers import timings_json
from llamaherd.pool import Timings, Usage


def test_rates_of_the_answer_are_those_of_the_tokens_after_the_first() -> None:
    usage = Usage(prompt_tokens=30, cached_tokens=10, completion_tokens=5)
    assert timings_json(usage, Timings(prompt_ms=100.0, predicted_ms=80.0)) == {
        "cache_n": 10,
        "prompt_n": 20,
        "prompt_ms": 100.0,
        "prompt_per_token_ms": 5.0,
        "prompt_per_second": 200.0,
        "predicted_n": 5,
        "predicted_ms": 80.0,
        "predicted_per_token_ms": 20.0,
        "predicted_per_second": 50.0,
    }


@pytest.mark.parametrize("tokens", [0, 1])
def test_an_answer_without_a_second_token_has_no_rate(tokens: int) -> None:
    # The first token is the prompt's last result: what passes until the answer's end is no time of a token.
    timings = timings_json(Usage(prompt_tokens=3, completion_tokens=tokens), Timings(prompt_ms=9.0, predicted_ms=0.03))
    assert timings["predicted_n"] == tokens
    assert timings["predicted_per_token_ms"] == timings["predicted_per_second"] == 0.0
