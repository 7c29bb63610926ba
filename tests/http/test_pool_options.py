"""The command line's options of the pool come out as the pool takes them."""

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from llamaherd.http.pool_options import PoolSettings, pool_options
from llamaherd.pool import ModelSpec


def parsed(*arguments: str) -> PoolSettings:
    found: list[PoolSettings] = []

    @click.command()
    @pool_options
    def command(pool: PoolSettings) -> None:
        found.append(pool)

    result = CliRunner().invoke(command, arguments, standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return found[0]


def test_memory_is_counted_by_default_and_in_mebibytes_otherwise() -> None:
    assert parsed().memory_budget == "auto"
    assert parsed("--memory-budget", "auto").memory_budget == "auto"
    assert parsed("--memory-budget", "3").memory_budget == 3 * 1024 * 1024
    assert parsed("--memory-budget", "0").memory_budget == 0


@pytest.mark.parametrize("wrong", ["plenty", "-1", ""])
def test_a_budget_that_is_none_is_refused(wrong: str) -> None:
    with pytest.raises(click.BadParameter):
        parsed("--memory-budget", wrong)


def test_times_and_replicas_go_into_every_model() -> None:
    settings = parsed("--unload-idle-seconds", "9", "--replicas", "2", "--queue-timeout", "1.5")
    (spec,) = settings.apply([ModelSpec(name="m", path=Path("/m.gguf"))])
    assert (spec.unload_idle_seconds, spec.sleep_idle_seconds, spec.replicas) == (9.0, None, 2)
    assert settings.queue_timeout == 1.5


def test_what_requests_get_that_say_nothing_goes_into_every_model() -> None:
    arguments = ("--temp", "0.6", "--top-k", "20", "-n", "64", "--ignore-eos", "-l", "15-inf", "-l", "16+1")
    (spec,) = parsed(*arguments).apply([ModelSpec(name="m", path=Path("/m.gguf"))])

    assert spec.defaults == {
        "temperature": 0.6,
        "top_k": 20,
        "max_tokens": 64,
        "ignore_eos": True,
        "logit_bias": ((15, False), (16, 1.0)),
    }
    assert parsed().defaults == {}


@pytest.mark.parametrize("option", ["--samplers", "--sampler-seq"])
def test_no_samplers_are_a_choice_too(option: str) -> None:
    assert parsed(option, "").defaults == {"samplers": ()}


@pytest.mark.parametrize("wrong", [("--top-p", "2"), ("--samplers", "psychic"), ("--mirostat", "3"), ("-l", "15+inf")])
def test_a_default_that_no_request_could_have_is_refused(wrong: tuple[str, ...]) -> None:
    with pytest.raises(click.UsageError):
        parsed(*wrong)


def test_workers_are_reused_unless_that_is_not_wanted() -> None:
    assert parsed().to_pool()["reuse_workers"] is True
    assert parsed("--no-reuse-workers").to_pool()["reuse_workers"] is False
