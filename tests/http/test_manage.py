"""The commands that manage models, on this machine's cache and on a running server."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from hub_cache import write_repo
from live_front import LiveFront
from llamaherd.http.cli import main
from llamaherd.http.library import Library
from llamaherd.http.presets import PresetOptions
from llamaherd.pool import Caches, Catalog, ModelSpec, Sources, gather, scan_cache
from stand_in_hub import Fault, StandInHub
from tiny_gguf import write_scripted_llama

CONTENT = b"GGUF" + os.urandom(100_000)
NAME = "u/r:Q8_0"

Output = pytest.CaptureFixture[str]


def read(sources: Sources) -> Catalog:
    return gather(sources, PresetOptions().configure)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody is logged in, and the cache is the test's own."""
    for name in os.environ:
        if name.startswith(("LLAMA_ARG_", "LLAMA_API", "LLAMAHERD_SERVER", "HF_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    with StandInHub() as hub:
        hub.add("u/r", {"m-Q8_0.gguf": CONTENT})
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


@pytest.fixture
def front(cache: Path) -> Iterator[LiveFront]:
    """A server over the test's cache, with one model of the scripted engine."""
    library = Library(Sources(given=(ModelSpec(name="m", engine="fake"),), cache=cache), read, Caches(cache, cache))
    catalog = read(Sources(given=(ModelSpec(name="m", engine="fake"),), cache=cache))
    library.take(catalog)
    with LiveFront(*catalog.models, library=library) as front:
        yield front


def listed(cache: Path) -> list[str]:
    return [model.name for model in scan_cache(cache)]


def json_of(output: Output) -> Any:
    return json.loads(output.readouterr().out)


# --- this machine ---


def test_pull_downloads_and_says_where(hub: StandInHub, cache: Path, capsys: Output) -> None:
    assert main(["pull", NAME]) == 0

    (model,) = scan_cache(cache)
    assert capsys.readouterr().out == f"{NAME}: {model.path}\n"


def test_pull_says_in_one_line_what_went_wrong(hub: StandInHub, capsys: Output) -> None:
    assert main(["pull", "u/missing"]) == 1
    assert main(["pull", "../x"]) == 1
    assert main(["pull", NAME, "--offline"]) == 1

    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("error: ")[2][:30] for line in lines] == [
        "there is no repository u/missi",
        "'../x' is no model name of the",
        "u/r:Q8_0 is not in the cache, ",
    ]


def test_an_interrupted_pull_goes_on_when_it_is_repeated(hub: StandInHub, cache: Path, capsys: Output) -> None:
    hub.fault = Fault(hold=threading.Event())
    command = [sys.executable, "-P", "-m", "llamaherd.http", "pull", NAME]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not any(path.stat().st_size for path in cache.rglob("*.incomplete")):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)

    assert process.returncode == 130
    assert listed(cache) == []
    hub.fault = Fault()
    assert main(["pull", NAME]) == 0
    assert hub.downloads("m-Q8_0.gguf")[-1].range.startswith("bytes=")


def test_list_shows_the_cache(cache: Path, capsys: Output) -> None:
    write_repo(cache, "u/r", ["m-Q8_0.gguf", "mmproj-f16.gguf"])

    assert main(["list"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[0] == NAME
    assert main(["list", "--json"]) == 0
    (row,) = json_of(capsys)["models"]
    assert (row["name"], row["size"], Path(row["mmproj"]).name) == (NAME, 19, "mmproj-f16.gguf")


def test_show_tells_the_facts_of_a_file_and_of_a_cached_model(tmp_path: Path, cache: Path, capsys: Output) -> None:
    model = tmp_path / "tiny.gguf"
    write_scripted_llama(model)
    repo = write_repo(cache, "u/r", ["m-Q8_0.gguf"])
    (link,) = repo.rglob("m-Q8_0.gguf")
    link.resolve().write_bytes(model.read_bytes())

    assert main(["show", str(model), "--json"]) == 0
    of_file = json_of(capsys)
    assert main(["show", "u/r", "--json"]) == 0
    of_name = json_of(capsys)
    assert main(["show", NAME]) == 0

    assert (of_file["architecture"], of_file["modalities"], of_file["shards"]) == ("llama", ["text"], 1)
    assert of_name["n_params"] == of_file["n_params"] > 0
    assert "architecture: llama\n" in capsys.readouterr().out


def test_show_says_in_one_line_that_a_file_is_broken(cache: Path, capsys: Output) -> None:
    write_repo(cache, "u/r", ["m-Q8_0.gguf"])

    assert main(["show", NAME]) == 1
    assert main(["show", "u/missing"]) == 1

    assert len(capsys.readouterr().err.splitlines()) == 2


def test_rm_deletes_from_the_cache(cache: Path, capsys: Output) -> None:
    write_repo(cache, "u/r", ["m-Q8_0.gguf", "m-Q2_K.gguf"])

    assert main(["rm", NAME]) == 0
    assert capsys.readouterr().out == f"{NAME}: deleted, 0.0 MB freed\n"
    assert listed(cache) == ["u/r:Q2_K"]
    assert main(["rm", "u/r", "--json"]) == 0
    assert json_of(capsys)["freed"] > 0
    assert main(["rm", "u/r"]) == 1
    assert "is not in the cache" in capsys.readouterr().err


# --- a server ---


def test_pull_has_a_server_download(front: LiveFront, hub: StandInHub, cache: Path, capsys: Output) -> None:
    assert main(["pull", NAME, "--server", front.url]) == 0
    assert capsys.readouterr().out == f"{NAME}: downloaded\n"
    assert listed(cache) == [NAME]

    assert main(["pull", "u/missing", "--server", front.url]) == 1
    assert "no repository u/missing" in capsys.readouterr().err


def test_a_server_lists_loads_shows_and_unloads(front: LiveFront, capsys: Output) -> None:
    address = ["--server", front.url]
    assert main(["load", "m", *address]) == 0
    capsys.readouterr()
    while main(["ps", "--json", *address]) == 0:
        models = json_of(capsys)["models"]
        if models and models[0]["status"]["value"] == "loaded":
            break
    assert main(["list", *address]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["m", "loaded", "preset"]
    assert main(["show", "m", "--json", *address]) == 0
    assert json_of(capsys)["id"] == "m"
    assert main(["load", "m", *address]) == 1
    assert "already running" in capsys.readouterr().err
    assert main(["unload", "m", "--json", *address]) == 0
    assert json_of(capsys) == {"model": "m", "success": True}


def test_a_server_tells_how_far_a_download_is(front: LiveFront, hub: StandInHub, capsys: Output) -> None:
    hub.fault = Fault(hold=threading.Event())
    httpx2.post(f"{front.url}/models", json={"model": NAME}, timeout=30).raise_for_status()

    assert main(["ps", "--server", front.url]) == 0
    assert main(["unload", NAME, "--server", front.url, "--json"]) == 0

    _, row, answer = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"{NAME} +downloading [0-9]+% +cache *", row)
    assert json.loads(answer) == {"model": NAME, "success": True}


def test_a_server_deletes_from_its_cache(front: LiveFront, hub: StandInHub, cache: Path, capsys: Output) -> None:
    assert main(["pull", NAME, "--server", front.url]) == 0
    while not any(row.split()[:2] == [NAME, "unloaded"] for row in capsys.readouterr().out.splitlines()):
        main(["list", "--server", front.url])
    assert main(["rm", NAME, "--server", front.url]) == 0
    assert listed(cache) == []


def test_logs_are_printed_and_followed(front: LiveFront, capsys: Output) -> None:
    front.ask(lambda pool: pool._herd.find("m").replicas[0].log.feed(b"one\ntwo\n"))  # type: ignore[union-attr]

    assert main(["logs", "m", "--server", front.url]) == 0
    assert capsys.readouterr().out.splitlines() == ["one", "two"]

    command = [sys.executable, "-P", "-m", "llamaherd.http", "logs", "-f", "m", "--json", "--server", front.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        json.loads(process.stdout.readline())
        front.ask(lambda pool: pool._herd.find("m").replicas[0].log.feed(b"three\n"))  # type: ignore[union-attr]
        third = json.loads(process.stdout.readline())
        process.send_signal(signal.SIGINT)

    assert (first, third) == ({"model": "m", "line": "one"}, {"model": "m", "line": "three"})
    assert process.returncode == 130


def test_events_are_printed_as_they_come(front: LiveFront) -> None:
    command = [sys.executable, "-P", "-m", "llamaherd.http", "events", "--json", "--server", front.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["event"] == "snapshot"
        front.ask(lambda pool: pool.start_load("m"))
        assert json.loads(process.stdout.readline())["model"] == "m"
        process.send_signal(signal.SIGINT)


def test_a_server_that_is_not_there_is_one_line(capsys: Output) -> None:
    assert main(["ps", "--server", "http://127.0.0.1:9"]) == 1
    assert capsys.readouterr().err.startswith("llamaherd: error: http://127.0.0.1:9 cannot be reached")


def test_an_unknown_model_of_a_server_is_one_line(front: LiveFront, capsys: Output) -> None:
    for command in ("load", "unload", "rm", "logs", "show"):
        assert main([command, "nobody", "--server", front.url]) == 1

    assert len(capsys.readouterr().err.splitlines()) == 5


# --- completion ---


def completed(words: str) -> list[str]:
    """Return what bash would offer for the last of some words."""
    environment = {
        **os.environ,
        "_LLAMAHERD_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    done = subprocess.run(
        [sys.executable, "-P", "-m", "llamaherd.http"], env=environment, capture_output=True, text=True
    )
    return [line for line in done.stdout.splitlines() if line]


def test_a_shell_completes_the_names_of_cached_models(cache: Path) -> None:
    write_repo(cache, "u/r", ["m-Q8_0.gguf"])

    assert completed("llamaherd rm u/") == [f"plain,{NAME}"]
    assert completed("llamaherd show u/") == [f"plain,{NAME}"]


def test_a_shell_completes_the_names_of_a_servers_models(front: LiveFront, monkeypatch: pytest.MonkeyPatch) -> None:
    assert completed(f"llamaherd show --server {front.url} m") == ["plain,m"]
    monkeypatch.setenv("LLAMAHERD_SERVER", front.url)
    assert [completed(f"llamaherd {command} m") for command in ("load", "unload", "logs")] == [["plain,m"]] * 3
    monkeypatch.setenv("LLAMAHERD_SERVER", "http://127.0.0.1:9")
    assert completed("llamaherd load m") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_for_the_shell_is_printed(shell: str, capsys: Output) -> None:
    assert main(["completion", shell]) == 0

    assert "_LLAMAHERD_COMPLETE" in capsys.readouterr().out


# --- serve ---


def test_serve_downloads_the_repository_that_it_is_told_to_offer(hub: StandInHub, cache: Path) -> None:
    command = [sys.executable, "-P", "-m", "llamaherd.http", "serve", "-hf", NAME, "--port", "0", "-a", "small"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.send_signal(signal.SIGINT)

    assert line.rstrip().endswith("model: small")
    assert listed(cache) == [NAME]


def test_serve_offline_wants_the_repository_in_the_cache(hub: StandInHub, capsys: Output) -> None:
    assert main(["serve", "-hf", NAME, "--offline"]) == 1
    assert main(["serve", "-hf", "../x"]) == 1

    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("u/r:Q8_0 is not in the cache, and this is offline")
    assert "is no model name" in lines[1]
    assert hub.requests == []


def test_serve_downloads_the_address_that_it_is_told_to_offer(hub: StandInHub, cache: Path, tmp_path: Path) -> None:
    url = f"{hub.url}/u/r/resolve/main/m-Q8_0.gguf"
    path = tmp_path / "mine" / "a.gguf"
    command = [sys.executable, "-P", "-m", "llamaherd.http", "serve", "-mu", url, "-m", str(path), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.send_signal(signal.SIGINT)

    assert line.rstrip().endswith("model: a")
    assert path.read_bytes().startswith(b"GGUF")


def test_pull_takes_an_address_too(hub: StandInHub, cache: Path, capsys: Output) -> None:
    url = f"{hub.url}/u/r/resolve/main/m-Q8_0.gguf"

    assert main(["pull", url, "--json"]) == 0
    assert json_of(capsys) == {"model": "m-Q8_0.gguf", "path": str(cache / "m-Q8_0.gguf")}
    assert main(["pull", url, "--offline"]) == 0
    assert main(["pull", "http://127.0.0.1:9/x.gguf", "--offline"]) == 1
    assert main(["pull", "http://127.0.0.1:9/x"]) == 1
    assert main(["pull", url, "--server", "http://127.0.0.1:9"]) == 2

    lines = capsys.readouterr().err.splitlines()
    assert "x.gguf is not there, and this is offline" in lines[0]
    assert "does not end in the name of a .gguf file" in lines[1]


def test_serve_offline_wants_the_address_to_be_there(hub: StandInHub, cache: Path, capsys: Output) -> None:
    assert main(["serve", "-mu", "http://127.0.0.1:9/x.gguf", "--offline"]) == 1
    assert main(["serve", "-mu", "ftp://h/x.gguf"]) == 1
    assert main(["serve", "-mu", "http://127.0.0.1:9/x.gguf", "-hf", "u/r"]) == 1

    lines = capsys.readouterr().err.splitlines()
    assert "x.gguf is not there, and this is offline" in lines[0]
    assert "no http or https address" in lines[1]
    assert "cannot be given together" in lines[2]


def test_models_shows_a_repository_that_is_in_the_cache(cache: Path, capsys: Output) -> None:
    write_repo(cache, "u/r", ["m-Q8_0.gguf"])

    assert main(["models", "-hf", "u/r", "--json"]) == 0

    (row,) = json_of(capsys)["models"]
    assert (row["name"], Path(row["path"]).name) == ("u/r", "m-Q8_0.gguf")
