"""What a model's file recommends counts where nobody asked for anything, and nothing that it says can do harm."""

from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from engine_driver import drain, load_command, loaded
from llamaherd.pool.child.llama_engine import LlamaEngine
from llamaherd.pool.child.recommended import read_recommended, recommend
from llamaherd.pool.params import GenerateParams, completion_request, with_defaults
from llamaherd.pool.sampling import FILE_KEYS, problem_of
from llamaherd.transport.messages import Generate, Sampling
from tiny_gguf import write_scripted_llama

RECOMMENDS: dict[str, int | float | str] = {
    "sequence": "top-k;temp;unheard-of",
    "top_k": 20,
    "top_p": 0.5,
    "min_p": 0.25,
    "temp": 0.625,
    "penalty_last_n": 32,
    "penalty_repeat": 1.25,
    "xtc_probability": 0.5,
    "xtc_threshold": 0.125,
    "mirostat": 0,
    "mirostat_tau": 4.0,
    "mirostat_eta": 0.25,
}
#: The same by the names of requests.
VALUES: dict[str, Any] = {
    "samplers": ("top_k", "temperature"),
    "top_k": 20,
    "top_p": 0.5,
    "min_p": 0.25,
    "temperature": 0.625,
    "repeat_last_n": 32,
    "repeat_penalty": 1.25,
    "xtc_probability": 0.5,
    "xtc_threshold": 0.125,
    "mirostat": 0,
    "mirostat_tau": 4.0,
    "mirostat_eta": 0.25,
}


def sampled_with(path: Path, request: Generate) -> Sampling:
    """Return what a request of a loaded model is sampled with."""
    with loaded(path) as engine:
        engine.submit(request)
        drain(engine)
        sampling = engine.slots()[0].sampling
    assert sampling is not None
    return sampling


@pytest.fixture(scope="module")
def opinionated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recommends") / "m.gguf"
    write_scripted_llama(path, recommends=RECOMMENDS)
    return path


def test_a_request_that_says_nothing_is_sampled_as_the_file_recommends(opinionated: Path) -> None:
    assert sampled_with(opinionated, completion_request(1, "x", {})) == replace(Sampling(), **VALUES)


def test_what_was_asked_for_is_stronger_also_where_it_is_as_usual(opinionated: Path) -> None:
    usual = Sampling()
    asked: dict[str, Any] = {"temperature": usual.temperature, "top_p": 0.75, "samplers": list(usual.samplers)}
    params = with_defaults(cast("GenerateParams", asked), {"min_p": usual.min_p, "top_k": 7})
    got = sampled_with(opinionated, completion_request(1, "x", params))
    kept = {"temperature": usual.temperature, "top_p": 0.75, "samplers": usual.samplers, "min_p": 0.05, "top_k": 7}
    assert got == replace(usual, **{**VALUES, **kept})


def test_the_models_facts_tell_what_its_file_recommends(opinionated: Path, tmp_path: Path) -> None:
    write_scripted_llama(tmp_path / "m.gguf")
    told: list[object] = []
    for path in (opinionated, tmp_path / "m.gguf"):
        engine = LlamaEngine()
        told.append(engine.load(load_command(path), lambda _: True).to_meta().get("sampling"))
        engine.unload()
    assert told == [VALUES, None]


def test_a_file_without_such_keys_changes_nothing(tmp_path: Path) -> None:
    write_scripted_llama(tmp_path / "m.gguf")
    assert sampled_with(tmp_path / "m.gguf", completion_request(1, "x", {})) == Sampling()


def test_values_that_no_request_could_have_are_left_out(tmp_path: Path) -> None:
    wrong: dict[str, int | float | str] = {
        "temp": float("nan"),
        "top_p": 7.0,
        "top_k": "many",
        "mirostat": 3,
        "penalty_repeat": float("inf"),
        "sequence": "psychic",
    }
    write_scripted_llama(tmp_path / "m.gguf", recommends={**wrong, "min_p": 0.5})
    assert sampled_with(tmp_path / "m.gguf", completion_request(1, "x", {})) == Sampling(min_p=0.5)


@given(st.dictionaries(st.sampled_from(sorted(FILE_KEYS.values())), st.text(max_size=30) | st.floats().map(str)))
def test_whatever_a_file_says_can_be_sampled_with(texts: dict[str, str]) -> None:
    values = read_recommended(lambda key: texts.get(key, ""))
    assert problem_of(recommend(Generate(request=1, prompt="x"), values).sampling) is None
