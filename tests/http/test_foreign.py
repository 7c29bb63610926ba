"""llama-server's whole command line is taken: what it alone knows is named, what nobody knows is an error."""

import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from llamaherd.http.cli import serve
from llamaherd.http.foreign import ForeignCommand, foreign_variables, take_foreign
from llamaherd.pool import FLAGS, Flag, find_flag, find_key

OWN = {"--port": 1, "--mmap": 0, "--no-mmap": 0, "-c": 1, "--ctx-size": 1, "--range": 2}
PAGE = (Path(__file__).parents[2] / "http" / "ENDPOINTS.md").read_text().split("## Flags")[1]
OWN_OPTIONS = {name for option in serve.params for name in (*option.opts, *option.secondary_opts)}


@click.command(cls=ForeignCommand)
@click.option("-c", "--ctx-size", type=int, envvar="LLAMA_ARG_CTX_SIZE")
@click.option("--mmap/--no-mmap", default=True)
def small(ctx_size: int | None, mmap: bool) -> None:
    """A command with two of llama-server's options."""
    click.echo(f"{ctx_size} {mmap}")


@pytest.mark.parametrize(
    ("line", "kept", "flags"),
    [
        ("--port 1 --mmap", "--port 1 --mmap", ""),
        ("--rpc host:1 --port 1", "--port 1", "--rpc"),
        ("--jinja --no-jinja -c 1", "-c 1", "--jinja"),
        ("--control-vector-layer-range 1 2 -c 1", "-c 1", "--control-vector-layer-range"),
        ("--rpc=host:1 -c 1", "-c 1", "--rpc"),
        ("--ctx_size 1 --cpu_mask ff", "--ctx-size 1", "--cpu-mask"),
        ("--port --rpc", "--port --rpc", ""),  # a value, whatever it looks like
        ("--range 1 --rpc x", "--range 1 --rpc x", ""),
        ("--unheard-of 1", "--unheard-of 1", ""),
        ("-c 1 -- --rpc x", "-c 1 -- --rpc x", ""),
        ("-ctk q8_0 --cache-type-k q8_0", "", "--cache-type-k"),
    ],
)
def test_flags_that_only_llama_server_knows_go_with_their_values(line: str, kept: str, flags: str) -> None:
    taken = take_foreign(line.split(), OWN)

    assert (taken.arguments, [flag.name for flag in taken.flags]) == (kept.split(), flags.split())


def test_a_flag_without_its_value_is_an_error() -> None:
    with pytest.raises(click.UsageError, match="--rpc' requires an argument"):
        take_foreign(["--rpc"], OWN)


def test_what_is_left_out_is_named_in_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    for flag in FLAGS:
        for env in flag.envs:
            monkeypatch.delenv(env, raising=False)
    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "7")
    monkeypatch.setenv("LLAMA_ARG_RPC", "host:1")

    done = CliRunner().invoke(small, ["--no-mmap", "--hf-token", "secret", "--jinja"])

    assert (done.exit_code, done.stdout) == (0, "7 False\n")
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith("so ignored: --hf-token, --jinja, LLAMA_ARG_RPC\n")
    assert "secret" not in done.stderr


def test_what_nobody_knows_is_an_error() -> None:
    done = CliRunner().invoke(small, ["--unheard-of"])

    assert done.exit_code == 2
    assert "No such option '--unheard-of'" in done.stderr


def test_a_variable_that_says_the_opposite_is_known_too() -> None:
    assert foreign_variables({"LLAMA_ARG_NO_JINJA": "1", "LLAMA_ARG_JINJA": ""}, set()) == ["LLAMA_ARG_NO_JINJA"]


def test_a_flag_is_found_by_every_spelling() -> None:
    layers = find_flag("-ngl")

    assert layers is not None and layers.values == 1
    assert {find_key(key) for key in ("ngl", "gpu-layers", "n-gpu-layers", "LLAMA_ARG_N_GPU_LAYERS")} == {layers}
    assert find_flag("--n_gpu_layers") is layers
    assert find_flag("ngl") is find_key("--ngl") is find_flag("-") is None


def test_no_spelling_means_two_flags() -> None:
    names = [name for flag in FLAGS for name in (*flag.names, *flag.negated)]
    envs = [env for flag in FLAGS for env in flag.envs]

    assert len(set(names)) == len(names)
    assert len(set(envs)) == len(envs)


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.name)
def test_every_flag_of_llama_server_is_on_the_page_where_it_belongs(flag: Flag) -> None:
    present, absent = PAGE.split("### Present")[1].split("### Absent")
    section = present if OWN_OPTIONS & {*flag.names, *flag.negated} else present + absent

    for name in (*flag.names, *flag.negated):
        assert re.search(rf"`{re.escape(name)}`", section), f"{name} is not where it belongs"
