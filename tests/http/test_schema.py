"""Bodies are checked for their types, and what cannot be served is refused by name."""

from typing import Any

import pytest

from llamaherd.http.problems import Problem
from llamaherd.http.schema import UNSUPPORTED, ChatBody, CompletionBody, parse

PROMPT = {"model": "m", "prompt": "hello"}

ON: dict[str, Any] = {
    "best_of": 2,
    "echo": True,
    "suffix": "end",
    "functions": [{}],
    "function_call": {"name": "f"},
    "response_format": {"type": "json_object"},
    "grammar": 'root ::= "a"',
    "json_schema": {},
    "lora": [{"id": 0, "scale": 1}],
    "post_sampling_probs": True,
    "timings_per_token": True,
    "t_max_predict_ms": 100,
    "n_indent": 2,
}


def refusal(raw: dict[str, Any], kind: type[ChatBody] | type[CompletionBody] = CompletionBody) -> Problem:
    with pytest.raises(Problem) as caught:
        parse(raw, kind)
    return caught.value


def test_fields_that_nobody_knows_are_ignored() -> None:
    assert parse({**PROMPT, "user": "me", "made_up": [1]}, CompletionBody).to_prompts() == ["hello"]


def test_null_is_the_same_as_leaving_a_field_out() -> None:
    nulls = dict.fromkeys((*CompletionBody.__struct_fields__, *UNSUPPORTED))
    assert parse(nulls, CompletionBody) == CompletionBody()


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_field_that_cannot_be_served_is_refused_by_name(name: str) -> None:
    problem = refusal({**PROMPT, name: ON[name]})
    assert problem.kind == (400, "not_supported_error")
    assert problem.param == name
    assert name in problem.message


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, off in UNSUPPORTED.items() for value in off])
def test_a_field_that_cannot_be_served_passes_when_it_means_off(name: str, value: object) -> None:
    assert parse({**PROMPT, name: value}, CompletionBody).prompt == "hello"


def test_the_best_of_as_many_as_are_wanted_are_all_of_them() -> None:
    assert parse({**PROMPT, "n": 3, "best_of": 3}, CompletionBody).n == 3
    assert parse({**PROMPT, "n_cmpl": 3, "best_of": 3}, CompletionBody)
    for more in ({"n": 2}, {"n": 2, "n_cmpl": 3}, {"n_cmpl": 2}, {}):
        assert refusal({**PROMPT, **more, "best_of": 3}).param == "best_of"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", 1),
        ("stream", "yes"),
        ("max_tokens", "many"),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", "hot"),
        ("seed", 0.5),
        ("stop", 7),
        ("stop", [1]),
        ("stream_options", []),
        ("prompt", True),
    ],
)
def test_a_wrong_type_is_an_error_with_the_path_of_the_field(field: str, value: object) -> None:
    problem = refusal({**PROMPT, field: value})
    assert problem.kind == (400, "invalid_request_error")
    assert problem.param is not None
    assert problem.param.startswith(field)
    assert problem.message.startswith(f"{problem.param}: expected")


def test_an_integer_may_be_written_as_another_kind_of_number() -> None:
    body = parse(
        {**PROMPT, "max_tokens": 256.0, "seed": 1e3, "n": 2.0, "temperature": 1.0, "logprobs": 3.0}, CompletionBody
    )
    assert (body.max_tokens, body.seed, body.choices, body.shown_probs) == (256, 1000, 2, 3)
    assert all(type(value) is int for value in (body.max_tokens, body.seed, body.n, body.logprobs))


@pytest.mark.parametrize("value", [1.5, 1e300, True])
def test_other_numbers_are_no_integers(value: object) -> None:
    assert refusal({**PROMPT, "seed": 1.0, "max_tokens": value}).param == "max_tokens"


def test_the_path_leads_into_nested_fields() -> None:
    assert refusal({"stream_options": {"include_usage": "x"}}).param == "stream_options.include_usage"
    assert refusal({"messages": [{}, "hello"]}, ChatBody).param == "messages[1]"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"max_tokens": 1}, 1),
        ({"max_tokens": 1, "max_completion_tokens": 2}, 2),
        ({"max_tokens": 1, "max_completion_tokens": 2, "n_predict": 3}, 3),
        ({"max_tokens": 1, "n_predict": None}, 1),
        ({"max_tokens": 1, "n_predict": 0}, 0),
    ],
)
def test_the_most_tokens_have_three_names(fields: dict[str, Any], expected: int | None) -> None:
    assert parse(fields, CompletionBody).to_params().get("max_tokens") == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a", "a"), ("", ""), ([1, 2], [1, 2]), (["a"], "a"), ([[1, 2]], [1, 2]), ([1, "a"], [1, "a"])],
)
def test_one_prompt_comes_in_many_forms(prompt: Any, expected: object) -> None:
    assert parse({"prompt": prompt}, CompletionBody).to_prompts() == [expected]


NO_PROMPTS: list[Any] = [None, [], [None], [[{}]], {"a": 1}]


@pytest.mark.parametrize("prompt", NO_PROMPTS)
def test_what_is_no_prompt_is_refused(prompt: Any) -> None:
    with pytest.raises(Problem) as caught:
        parse({"prompt": prompt}, CompletionBody).to_prompts()
    assert caught.value.kind.status == 400
    assert caught.value.param == "prompt"
