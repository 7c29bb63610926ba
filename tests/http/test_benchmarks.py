"""``llamaherd bench``: it finds the benchmarks of the source tree and hands their arguments on."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from llamaherd.http import benchmarks
from llamaherd.http.cli import cli


def llamaherd(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-P", "-m", "llamaherd.http", *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("name", benchmarks.NAMES)
def test_every_benchmark_is_a_program_of_the_tree(name: str) -> None:
    assert (Path(__file__).parents[2] / "bench" / f"bench_{name}.py").is_file()


def test_arguments_and_the_exit_code_are_the_benchmarks_own() -> None:
    shown = llamaherd("bench", "transport", "--help")
    assert shown.returncode == 0 and "--quick" in shown.stdout
    assert llamaherd("bench", "transport", "--no-such-option").returncode == 2


def test_an_unknown_benchmark_is_named() -> None:
    refused = llamaherd("bench", "speed")
    assert refused.returncode == 2
    assert "speed" in refused.stderr and "transport" in refused.stderr


def test_without_the_source_tree_it_says_where_the_benchmarks_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(benchmarks, "FOLDER", tmp_path / "bench")
    result = CliRunner().invoke(cli, ["bench", "pool"])
    assert result.exit_code == 1
    assert "part of the source tree" in result.output
