"""Which samplers a request gets: the reference's order, nothing that is off, and none at all when nothing is drawn."""

from typing import Any

import pytest

from llamaherd.pool.child.chain import Step, memory, plan
from llamaherd.transport.messages import Sampling

EVERYTHING: dict[str, Any] = {
    "repeat_penalty": 1.1,
    "dry_multiplier": 0.8,
    "top_n_sigma": 2.0,
    "typical_p": 0.9,
    "xtc_probability": 0.5,
}


def kinds(*, biased: bool = False, **fields: Any) -> list[str] | None:
    steps = plan(Sampling(**fields), 1000, 512, biased=biased)
    return None if steps is None else [step.kind for step in steps]


def test_the_defaults_are_llama_servers() -> None:
    assert plan(Sampling(seed=3), 1000, 512, biased=False) == [
        Step("top_k", (40,)),
        Step("top_p", (0.95, 0)),
        Step("min_p", (0.05, 0)),
        Step("temp", (0.8,)),
        Step("dist", (3,)),
    ]


def test_everything_stands_in_the_references_order() -> None:
    assert kinds(biased=True, dynatemp_range=0.2, **EVERYTHING) == [
        "logit_bias",
        "penalties",
        "dry",
        "top_n_sigma",
        "top_k",
        "typical",
        "top_p",
        "min_p",
        "xtc",
        "temp_ext",
        "dist",
    ]


def test_the_callers_order_counts_and_what_it_leaves_out_is_left_out() -> None:
    assert kinds(samplers=("temperature", "min_p", "top_k"), **EVERYTHING) == ["temp", "min_p", "top_k", "dist"]
    assert kinds(samplers=()) == ["dist"]


def test_adaptive_p_draws_in_place_of_the_last() -> None:
    assert kinds(samplers=("adaptive_p", "min_p"), adaptive_target=0.3) == ["min_p", "adaptive_p"]


@pytest.mark.parametrize(
    "fields",
    [
        {"top_p": 0.9},
        {"top_p": 1.0, "typical_p": 0.9},
        {"top_p": 1.0, "xtc_probability": 0.1},
        {"top_p": 1.0, "dynatemp_range": 0.1},
        {"samplers": ("top_p", "top_k")},
    ],
)
def test_a_sampler_that_sorts_never_gets_the_whole_vocabulary(fields: dict[str, Any]) -> None:
    steps = plan(Sampling(top_k=0, **fields), 1000, 512, biased=False)
    assert steps is not None
    cut = steps.index(Step("top_k", (1000,)))
    assert steps[cut + 1].kind in {"top_p", "typical", "xtc", "temp_ext"}


def test_what_does_not_sort_needs_no_cut() -> None:
    assert kinds(top_k=0, top_p=1) == ["min_p", "temp", "dist"]
    assert kinds(top_k=-1, top_p=1, min_p=0) == ["temp", "dist"]


@pytest.mark.parametrize(("version", "kind"), [(1, "mirostat"), (2, "mirostat_v2")])
def test_mirostat_replaces_the_others(version: int, kind: str) -> None:
    assert kinds(mirostat=version, **EVERYTHING) == ["temp", kind]
    assert kinds(mirostat=version, biased=True) == ["logit_bias", "temp", kind]


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": -1},
        {"temperature": 1e-30},
        {"temperature": 0, "top_k": 0, "top_n_sigma": 1.0},
        {"temperature": 0, "mirostat": 2},
        {"temperature": 0, "repeat_penalty": 1.3, "repeat_last_n": 0},
        {"temperature": 0, "dry_multiplier": 1, "dry_penalty_last_n": 0},
        {"temperature": 0, "xtc_probability": 1, "xtc_threshold": 0.6},
        {"top_k": 1},
    ],
)
def test_what_can_only_be_the_highest_logit_needs_no_samplers(fields: dict[str, Any]) -> None:
    assert kinds(**fields) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"biased": True},
        {"repeat_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"dry_multiplier": 0.5},
        {"typical_p": 0.9},
        {"xtc_probability": 0.1},
        {"dynatemp_range": 0.1},
        {"samplers": ("top_k",)},
        {"samplers": ("adaptive_p", "temperature"), "adaptive_target": 0.5},
    ],
)
def test_what_may_change_the_highest_logit_keeps_its_samplers_at_temperature_zero(fields: dict[str, Any]) -> None:
    assert kinds(temperature=0, **fields) is not None


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({}, 0),
        ({"repeat_penalty": 1.1}, 64),
        ({"repeat_penalty": 1.1, "repeat_last_n": 7}, 7),
        ({"repeat_penalty": 1.1, "repeat_last_n": -1}, 512),
        ({"repeat_penalty": 1.1, "repeat_last_n": 2**31 - 1}, 512),
        ({"dry_multiplier": 1, "dry_penalty_last_n": 100, "presence_penalty": 1}, 100),
        ({"dry_multiplier": 1, "dry_penalty_last_n": 100, "samplers": ("penalties",)}, 0),
    ],
)
def test_the_prompts_tail_is_told_as_far_as_somebody_looks_back(fields: dict[str, Any], tokens: int) -> None:
    sampling = Sampling(**fields)
    assert memory(sampling, plan(sampling, 1000, 512, biased=False) or [], 512) == tokens


def test_nobody_remembers_more_than_a_sequence_can_have() -> None:
    steps = plan(Sampling(frequency_penalty=1, repeat_last_n=2**31 - 1), 1000, 512, biased=False)
    assert steps is not None
    assert steps[0] == Step("penalties", (1000, 512, 1.0, 1, 0.0))
