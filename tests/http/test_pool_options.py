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
