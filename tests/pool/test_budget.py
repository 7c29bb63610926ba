"""Budgets of thinking through the pool: a real worker whose model would think on."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from chat_templates import ALWAYS_THINKS, HARMONY, QWEN3
from llamaherd.pool import BadRequest, Completion, EngineOptions, ModelSpec, SyncPool
from tiny_gguf import write_scripted_llama

QUESTION = [{"role": "user", "content": "How many?"}]
TAGS = ("<think>", "</think>")
THOUGHTS = ("One", "▁two", "▁three", "▁four")
OPTIONS = EngineOptions(n_ctx=1024, n_parallel=2, n_threads=1)
TOOL = {"type": "function", "function": {"name": "f"}}


def model(folder: Path, name: str, template: str, *script: str, controls: tuple[str, ...] = TAGS) -> ModelSpec:
    path = folder / f"{name}.gguf"
    write_scripted_llama(path, script=script, template=template, controls=controls, after=("t",))
    return ModelSpec(name=name, path=path, options=OPTIONS)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SyncPool]:
    folder = tmp_path_factory.mktemp("thinkers")
    thinker = model(folder, "thinker", ALWAYS_THINKS, *THOUGHTS, "</think>", "Fin.")
    brief = EngineOptions(n_ctx=1024, n_parallel=2, n_threads=1, reasoning_budget=1, reasoning_budget_message=" two")
    models = [
        thinker,
        msgspec.structs.replace(thinker, name="brief", options=brief),
        model(folder, "maybe", QWEN3, "<think>", *THOUGHTS, "</think>", "Fin."),
        model(
            folder,
            "harmony",
            HARMONY,
            *("<|channel|>", "analysis", "<|message|>", *THOUGHTS),
            # With all of these llama.cpp does not take <|end|> for the end of an answer.
            controls=("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|return|>", "<|call|>"),
        ),
    ]
    with SyncPool(models) as herd:
        yield herd


def ask(pool: SyncPool, name: str = "thinker", **params: Any) -> Completion:
    return pool.chat(name, QUESTION, temperature=0, **params).collect()


def test_without_a_budget_a_model_thinks_as_long_as_it_likes(pool: SyncPool) -> None:
    answer = ask(pool)
    assert (answer.reasoning, answer.text, answer.finish_reason) == ("One two three four", "Fin.", "stop")


@pytest.mark.parametrize(
    ("budget", "reasoning"), [(0, ""), (1, "One"), (3, "One two three"), (4, "One two three four")]
)
@pytest.mark.parametrize("name", ["thinker", "maybe"])
def test_a_budget_ends_the_thinking_and_the_answer_follows(
    pool: SyncPool, name: str, budget: int, reasoning: str
) -> None:
    answer = ask(pool, name, reasoning_budget_tokens=budget)
    assert (answer.reasoning, answer.text, answer.finish_reason) == (reasoning, "Fin.", "stop")
    # What is said for the model counts like what it says: tag, answer, end.
    assert answer.usage.completion_tokens == budget + 3 + (name == "maybe")


@pytest.mark.parametrize("params", [{}, {"top_k": 40, "temperature": 1.0}, {"n_probs": 2, "post_sampling_probs": True}])
def test_a_biased_token_ends_the_thinking_all_the_same(pool: SyncPool, params: dict[str, Any]) -> None:
    (end,) = pool.tokenize("thinker", "</think>")
    params = {**params, "logit_bias": [[end, False], ["Fin.", 50.0]], "max_tokens": 4}
    answer = pool.chat("thinker", QUESTION, reasoning_budget_tokens=2, **params).collect()
    assert "</think>" not in answer.reasoning and answer.text.startswith("Fin.")
    assert answer.usage.completion_tokens == 4


def test_it_may_be_told_why(pool: SyncPool) -> None:
    answer = ask(pool, reasoning_budget_tokens=1, reasoning_budget_message=", no more.\n")
    assert (answer.reasoning, answer.text) == ("One, no more.", "Fin.")


def test_the_models_options_hold_for_requests_that_do_not_say(pool: SyncPool) -> None:
    assert ask(pool, "brief").reasoning == "One two"
    assert ask(pool, "brief", reasoning_budget_tokens=3, reasoning_budget_message="").reasoning == "One two three"


def test_reasoning_that_is_left_in_the_content_is_limited_too(pool: SyncPool) -> None:
    answer = ask(pool, reasoning_budget_tokens=2, reasoning_format="none")
    assert (answer.reasoning, answer.text) == ("", "One two</think>Fin.")


def test_a_format_holds_behind_the_thoughts_that_were_cut(pool: SyncPool) -> None:
    format_: dict[str, Any] = {"type": "json_schema", "json_schema": {"schema": {"enum": [7]}}}
    answer = ask(pool, reasoning_budget_tokens=2, response_format=format_)
    assert answer.reasoning == "One two"
    assert json.loads(answer.text) == 7


def test_a_call_that_is_required_follows_the_thoughts_that_were_cut(pool: SyncPool) -> None:
    answer = ask(pool, reasoning_budget_tokens=2, tools=[TOOL], tool_choice="required", max_tokens=200)
    assert answer.reasoning == "One two"
    assert [call.name for call in answer.tool_calls] == ["f"]


def test_gpt_oss_goes_on_in_its_final_channel(pool: SyncPool) -> None:
    answer = ask(pool, "harmony", reasoning_budget_tokens=2)
    assert (answer.reasoning, answer.text) == ("One two", "One two three four")


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_budget_that_is_not_used_up_changes_nothing(pool: SyncPool, temperature: float) -> None:
    params: dict[str, Any] = {"temperature": temperature, "seed": 7, "max_tokens": 40, "ignore_eos": False}
    free = pool.chat("thinker", QUESTION, **params).collect()
    bound = pool.chat("thinker", QUESTION, reasoning_budget_tokens=1000, **params).collect()
    assert bound.tokens == free.tokens


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_under_a_budget_the_end_is_ignored_as_it_is_without(pool: SyncPool, temperature: float) -> None:
    params: dict[str, Any] = {
        "temperature": temperature,
        "seed": 7,
        "max_tokens": 20,
        "logit_bias": {2: 100.0},  # its end
    }
    assert pool.chat("thinker", QUESTION, **params).collect().finish_reason == "stop", "the model would end"
    free = pool.chat("thinker", QUESTION, ignore_eos=True, **params).collect()
    bound = pool.chat("thinker", QUESTION, ignore_eos=True, reasoning_budget_tokens=1000, **params).collect()
    assert bound.tokens == free.tokens


@pytest.mark.parametrize(
    "params",
    [
        {"reasoning_budget_tokens": -2},
        {"reasoning_budget_tokens": 2**31},
        {"reasoning_budget_tokens": 1.5},
        {"reasoning_budget_tokens": True},
        {"reasoning_budget_message": 3},
        {"reasoning_budget_message": "x" * 4097},
    ],
)
def test_a_wrong_budget_is_refused(pool: SyncPool, params: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match="reasoning_budget"):
        pool.chat("thinker", QUESTION, **params)
