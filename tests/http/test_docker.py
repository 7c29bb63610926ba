"""Models of registries from the command line and from a server: downloaded, listed, shown, used and deleted."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import httpx2
import pytest

from docker_cache import write_artifact
from live_front import LiveFront, say
from llamaherd.http.catalog_options import CatalogSettings, catalog_options
from llamaherd.http.cli import main
from llamaherd.http.library import Library
from llamaherd.http.options import engine_options
from llamaherd.http.presets import PresetOptions
from llamaherd.pool import (
    Caches,
    Catalog,
    EngineOptions,
    ModelSpec,
    PoolError,
    Sources,
    fingerprint,
    gather,
    scan_docker,
)
from stand_in_registry import TEMPLATE, Layer, RegistryFault, StandInRegistry
from tiny_gguf import write_scripted_llama

CONTENT = b"GGUF" + os.urandom(100_000)
REPO = "ai/smollm2"

Output = pytest.CaptureFixture[str]


def read(sources: Sources) -> Catalog:
    return gather(sources, PresetOptions().configure)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The caches are the test's own, and settings come from files alone."""
    for name in os.environ:
        if name.startswith(("LLAMA_ARG_", "LLAMA_API", "LLAMAHERD_SERVER", "HF_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def registry() -> Iterator[StandInRegistry]:
    with StandInRegistry(needs_token=True) as registry:
        registry.add(REPO, "latest", [Layer(CONTENT)])
        yield registry


@pytest.fixture
def name(registry: StandInRegistry) -> str:
    return f"{registry.host}/{REPO}:latest"


@pytest.fixture
def front(tmp_path: Path, cache: Path) -> Iterator[LiveFront]:
    """A server over the test's caches."""
    sources = Sources(given=(ModelSpec(name="m", engine="fake"),), cache=tmp_path / "hub", docker=cache)
    library = Library(sources, read, Caches(tmp_path / "hub", cache), watch=True, watch_seconds=0.05)
    catalog = read(sources)
    library.take(catalog)
    with LiveFront(*catalog.models, library=library) as front:
        yield front


def listed(cache: Path) -> list[str]:
    return [model.name for model in scan_docker(cache)]


def json_of(output: Output) -> Any:
    return json.loads(output.readouterr().out)


def models(front: LiveFront) -> dict[str, Any]:
    return {
        model["id"]: model for model in httpx2.get(f"{front.url}/models", timeout=30).raise_for_status().json()["data"]
    }


def until_listed(front: LiveFront, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Return the list once it is as wanted; the test's timeout is the deadline."""
    while not holds(found := models(front)):
        pass
    return found


# --- this machine ---


def test_a_model_is_pulled_listed_shown_and_removed(
    registry: StandInRegistry, name: str, tmp_path: Path, cache: Path, capsys: Output
) -> None:
    write_scripted_llama(tmp_path / "tiny.gguf")
    registry.add(REPO, "latest", [Layer((tmp_path / "tiny.gguf").read_bytes())])

    assert main(["pull", f"{registry.host}/{REPO}", "--json"]) == 0
    pulled = json_of(capsys)
    assert (pulled["model"], Path(pulled["path"]).name) == (name, "model.gguf")
    assert main(["list", "--json"]) == 0
    assert [row["name"] for row in json_of(capsys)["models"]] == [name]
    assert main(["show", name, "--json"]) == 0
    assert json_of(capsys)["architecture"] == "llama"
    assert main(["models", "--json"]) == 0
    row = next(row for row in json_of(capsys)["models"] if row["name"] == name)
    assert (row["aliases"], row["source"]) == ([name.removesuffix(":latest")], "cache")
    assert main(["rm", name]) == 0
    assert "deleted" in capsys.readouterr().out
    assert main(["rm", name]) == 1
    assert "is not in the cache" in capsys.readouterr().err
    assert not list(cache.rglob("*.gguf"))


def test_what_goes_wrong_is_told_in_one_line(registry: StandInRegistry, name: str, capsys: Output) -> None:
    assert main(["pull", name, "--offline"]) == 1
    assert main(["pull", name, "--hf-file", "x.gguf"]) == 1
    assert main(["pull", f"{registry.host}/a/missing"]) == 1
    assert main(["pull", "docker.io/../x"]) == 1
    registry.fault = RegistryFault(status=429, retry_after="9")
    assert main(["pull", name]) == 1

    lines = [line.partition("error: ")[2] for line in capsys.readouterr().err.splitlines()]
    assert len(lines) == 5
    words = ["this is offline", "no files to choose from", "there is no ", "no model name", "try again in 9 s"]
    assert all(word in line for word, line in zip(words, lines, strict=True))


def test_an_interrupted_pull_goes_on_when_it_is_repeated(registry: StandInRegistry, name: str, cache: Path) -> None:
    registry.fault = RegistryFault(hold=threading.Event())
    command = [sys.executable, "-P", "-m", "llamaherd.http", "pull", name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not any(path.stat().st_size for path in cache.rglob("*.incomplete")):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)

    assert (process.returncode, listed(cache)) == (130, [])
    registry.fault = RegistryFault()
    assert main(["pull", name]) == 0
    assert registry.pulls(CONTENT)[-1].range.startswith("bytes=")


def test_what_an_interrupted_pull_left_can_be_removed(registry: StandInRegistry, name: str, cache: Path) -> None:
    registry.fault = RegistryFault(wrong_bytes=True)
    assert main(["pull", name]) == 1
    assert list(cache.rglob("*.incomplete"))

    assert main(["rm", name]) == 0

    assert not list(cache.rglob("*.incomplete"))


# --- a server ---


def test_a_server_downloads_lists_and_deletes(front: LiveFront, name: str, cache: Path, tmp_path: Path) -> None:
    answer = httpx2.post(f"{front.url}/models", json={"model": name.removesuffix(":latest")}, timeout=30)
    assert answer.json() == {"success": True}

    model = until_listed(front, lambda found: "path" in found.get(name, {}))[name]
    assert (model["source"], model["can_remove"], model["status"]["value"]) == ("cache", True, "unloaded")
    assert model["aliases"] == [name.removesuffix(":latest")]
    twice = httpx2.post(f"{front.url}/models", json={"model": name}, timeout=30)
    assert (twice.status_code, "already exists" in twice.text) == (400, True)
    assert httpx2.delete(f"{front.url}/models", params={"model": name}, timeout=30).json() == {"success": True}
    assert list(models(front)) == ["m"]
    assert (listed(cache), list((tmp_path / "hub").rglob("*"))) == ([], [])


def test_a_download_that_is_deleted_is_cancelled_and_leaves_nothing(
    front: LiveFront, registry: StandInRegistry, name: str, cache: Path
) -> None:
    registry.fault = RegistryFault(hold=threading.Event())
    httpx2.post(f"{front.url}/models", json={"model": name}, timeout=30).raise_for_status()
    assert models(front)[name]["status"]["value"] == "downloading"

    assert httpx2.delete(f"{front.url}/models", params={"model": name}, timeout=30).json() == {"success": True}

    assert list(models(front)) == ["m"]
    assert not list(cache.glob("docker/*/blobs/*"))


@pytest.mark.parametrize(
    ("fault", "status", "header"),
    [
        (RegistryFault(status=429, retry_after="17"), 503, "17"),
        (RegistryFault(status=502), 503, None),
        (RegistryFault(status=404), 400, None),
        (RegistryFault(status=403), 400, None),
        (RegistryFault(manifest=b"{"), 400, None),
    ],
)
def test_a_registry_that_says_no_is_an_error_of_the_request(
    front: LiveFront, registry: StandInRegistry, name: str, fault: RegistryFault, status: int, header: str | None
) -> None:
    registry.fault = fault

    answer = httpx2.post(f"{front.url}/models", json={"model": name}, timeout=30)

    assert (answer.status_code, answer.headers.get("Retry-After")) == (status, header)


def test_pull_has_a_server_download(front: LiveFront, name: str, cache: Path, capsys: Output) -> None:
    assert main(["pull", name.removesuffix(":latest"), "--server", front.url]) == 0

    assert capsys.readouterr().out == f"{name}: downloaded\n"
    assert listed(cache) == [name]


def test_a_model_that_was_downloaded_answers_with_its_own_template(
    front: LiveFront, registry: StandInRegistry, name: str, tmp_path: Path
) -> None:
    write_scripted_llama(tmp_path / "tiny.gguf")
    template = b"{{ messages[0].content }}, says the template"
    registry.add(REPO, "latest", [Layer((tmp_path / "tiny.gguf").read_bytes()), Layer(template, TEMPLATE)])
    httpx2.post(f"{front.url}/models", json={"model": name}, timeout=30).raise_for_status()
    until_listed(front, lambda found: "path" in found.get(name, {}))

    with httpx2.Client(base_url=front.url, timeout=60) as client:
        answer = client.post("/v1/chat/completions", json={"model": name, "max_tokens": 2, **say("hi")})
        prompt = client.post("/apply-template", json={"model": name, **say("hi")})

    assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"]
    assert prompt.json()["prompt"] == "hi, says the template"


def test_a_cache_that_is_watched_takes_up_what_others_pull(front: LiveFront, cache: Path) -> None:
    write_artifact(cache, "docker.io/ai/smollm2", "x", {"model.gguf": b"GGUF"})

    until_listed(front, lambda found: "docker.io/ai/smollm2:x" in found)

    (cache / "ai_gemma3_4B.gguf").write_bytes(b"GGUF")
    until_listed(front, lambda found: "docker.io/ai/gemma3:4B" in found)


# --- the command line and presets ---


def serving(*arguments: str) -> tuple[ModelSpec, ...]:
    """Return what ``serve`` offers with these arguments."""
    specs: list[ModelSpec] = []

    @click.command()
    @catalog_options
    @engine_options
    def command(wanted: CatalogSettings, options: EngineOptions) -> None:
        if wanted.missing() is None:
            specs.extend(wanted.read(wanted.sources(options, tuple)).models)

    command.main([*arguments], standalone_mode=False)
    return tuple(specs)


def test_a_model_of_docker_is_served_under_both_its_names(cache: Path) -> None:
    files = {"model.gguf": b"GGUF", "mmproj.gguf": b"GGUF eyes", "template.jinja": b"{{ theirs }}"}
    write_artifact(cache, "docker.io/ai/smollm2", "latest", files)

    for written, aliases in (("smollm2", ("smollm2",)), ("docker.io/ai/smollm2:latest", ())):
        (spec,) = serving("-dr", written)
        assert (spec.name, spec.aliases, spec.repo) == ("docker.io/ai/smollm2:latest", aliases, spec.name)
        assert spec.path is not None and spec.path.read_bytes() == b"GGUF"
        assert spec.mmproj is not None and spec.options.chat_template == "{{ theirs }}"
    (spec,) = serving("--docker-repo", "ai/smollm2", "-a", "mine,yours", "--no-mmproj")
    assert (spec.name, spec.aliases, spec.mmproj) == ("mine", ("yours",), None)


def test_llama_servers_variable_and_its_files_count(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir()
    (cache / "ai_smollm2_135M-Q4_0.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("LLAMA_ARG_DOCKER_REPO", "smollm2:135M-Q4_0")

    (spec,) = serving()

    assert (spec.name, spec.aliases) == ("docker.io/ai/smollm2:135M-Q4_0", ("smollm2:135M-Q4_0",))
    assert spec.path == cache / "ai_smollm2_135M-Q4_0.gguf"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-dr", "../x"], "no model name"),
        (["-dr", "x", "-hf", "a/b"], "--hf-repo and --docker-repo"),
        (["-dr", "x", "-m", "a.gguf"], "--docker-repo cannot be given together with --model"),
        (["-dr", "x", "-hff", "a.gguf"], "no files to choose from"),
        (["-dr", "x", "--offline"], "docker.io/ai/x:latest is not in the cache, and this is offline"),
    ],
)
def test_what_cannot_be_served_is_refused(arguments: list[str], words: str) -> None:
    with pytest.raises((click.ClickException, PoolError), match=re.escape(words)):
        serving(*arguments)


def test_what_is_missing_is_downloaded_at_the_start(
    registry: StandInRegistry, name: str, tmp_path: Path, cache: Path
) -> None:
    write_scripted_llama(tmp_path / "tiny.gguf")
    registry.add(REPO, "latest", [Layer((tmp_path / "tiny.gguf").read_bytes())])
    command = [sys.executable, "-P", "-m", "llamaherd.http", "serve", "-dr", f"{registry.host}/{REPO}", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)

    assert line.endswith(f"model: {name}\n")
    assert listed(cache) == [name]


def test_a_preset_names_a_model_of_docker_that_is_downloaded_when_it_is_wanted(
    registry: StandInRegistry, name: str, tmp_path: Path, cache: Path
) -> None:
    write_scripted_llama(tmp_path / "tiny.gguf")
    registry.add(REPO, "latest", [Layer((tmp_path / "tiny.gguf").read_bytes()), Layer(b"{{ 'theirs' }}", TEMPLATE)])
    presets = tmp_path / "p.ini"
    presets.write_text(f"[mine]\ndocker-repo = {registry.host}/{REPO}\n[bad]\nLLAMA_ARG_DOCKER_REPO = ../x\n")
    sources = Sources(docker=cache, presets=presets)
    catalog = read(sources)
    (spec,) = catalog.models
    assert (spec.name, spec.path, spec.repo) == ("mine", None, name)
    assert "p.ini:4: LLAMA_ARG_DOCKER_REPO: '../x' is no model name" in catalog.broken[0].reason

    with LiveFront(spec) as front, httpx2.Client(base_url=front.url, timeout=60) as client:
        prompt = client.post("/apply-template", json={"model": "mine", **say("hi")})
        assert prompt.json()["prompt"] == "theirs"

    assert next(model for model in read(sources).models if model.name == "mine").options.chat_template
    assert listed(cache) == [name]


# --- the catalogue ---


def test_a_preset_sets_up_a_cached_model_by_its_name(tmp_path: Path, cache: Path) -> None:
    write_artifact(cache, "docker.io/ai/smollm2", "135M-Q4_0", {"model.gguf": b"GGUF", "template.jinja": b"theirs"})
    write_artifact(cache, "docker.io/ai/smollm2", "x", {"model.gguf": b"GGUF 2", "template.jinja": b"\xff"})
    presets = tmp_path / "p.ini"
    presets.write_text("[docker.io/ai/smollm2:135M-Q4_0]\nc = 77\n")

    first, second = read(Sources(docker=cache, presets=presets)).models
    presets.write_text("[docker.io/ai/smollm2:135M-Q4_0]\nchat-template = {{ ours }}\n")
    again, _ = read(Sources(docker=cache, presets=presets)).models

    assert (first.name, first.options.n_ctx, first.source) == ("docker.io/ai/smollm2:135M-Q4_0", 77, "preset")
    assert first.path is not None and first.path.read_bytes() == b"GGUF"
    assert (first.options.chat_template, again.options.chat_template) == ("theirs", "{{ ours }}")
    assert (second.name, second.options.chat_template) == ("docker.io/ai/smollm2:x", "")


def test_a_catalogue_of_many_artifacts_changes_its_stamp_with_any_of_them(cache: Path) -> None:
    sources = Sources(docker=cache)
    seen = {fingerprint(sources)}
    write_artifact(cache, "docker.io/ai/smollm2", "a", {"model.gguf": b"GGUF"})
    seen.add(fingerprint(sources))
    write_artifact(cache, "docker.io/ai/smollm2", "a", {"model.gguf": b"GGUF newer"})
    seen.add(fingerprint(sources))
    (cache / "ai_x_y.gguf").write_bytes(b"GGUF")
    seen.add(fingerprint(sources))

    assert len(seen) == 4
