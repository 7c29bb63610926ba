"""Models of registries in the cache: where it is, what is listed of it, and what a deletion takes and leaves."""

import os
from pathlib import Path

import pytest
from filelock import FileLock

from docker_cache import write_artifact
from llamaherd.pool import (
    BadRequest,
    DockerName,
    ModelNotFound,
    docker_cache,
    find_docker,
    parse_docker_name,
    remove_docker,
    scan_docker,
)
from llamaherd.pool.docker import registry_address

SMOL = "docker.io/ai/smollm2"
MODEL = {"model.gguf": b"GGUF smol"}
DIGEST = "sha256:" + "a" * 64


def names(cache: Path) -> list[str]:
    return [model.name for model in scan_docker(cache)]


def blobs(cache: Path) -> list[bytes]:
    return sorted(path.read_bytes() for path in cache.glob("docker/*/blobs/*"))


def test_the_cache_is_llama_cpps_own() -> None:
    assert docker_cache({"LLAMA_CACHE": "/a", "XDG_CACHE_HOME": "/b"}) == Path("/a")
    assert docker_cache({"LLAMA_CACHE": "", "XDG_CACHE_HOME": "/b"}) == Path("/b/llama.cpp")
    assert docker_cache({}) == Path.home() / ".cache" / "llama.cpp"


def test_models_are_listed_by_the_names_that_they_are_downloaded_by(tmp_path: Path) -> None:
    write_artifact(tmp_path, SMOL, "latest", {**MODEL, "mmproj.gguf": b"GGUF eyes", "template.jinja": b"{{ x }}"})
    write_artifact(tmp_path, SMOL, "135M-Q4_0", MODEL)
    write_artifact(tmp_path, "localhost:5000/a/b-c/d_e", DIGEST, MODEL)

    models = scan_docker(tmp_path)

    assert [(model.name, model.repo, model.is_default) for model in models] == [
        ("docker.io/ai/smollm2:135M-Q4_0", SMOL, False),
        ("docker.io/ai/smollm2:latest", SMOL, True),
        (f"localhost:5000/a/b-c/d_e@{DIGEST}", "localhost:5000/a/b-c/d_e", False),
    ]
    assert [model.mmproj is not None for model in models] == [False, True, False]
    assert [model.template is not None for model in models] == [False, True, False]
    for model in models:
        assert model.path.read_bytes() == b"GGUF smol"
        assert find_docker(tmp_path, parse_docker_name(model.name)) == model


def test_a_split_model_is_listed_once_it_is_whole(tmp_path: Path) -> None:
    parts = {f"model-0000{part}-of-00003.gguf": b"GGUF %d" % part for part in (1, 2, 3)}
    folder = write_artifact(tmp_path, SMOL, "big", parts)
    (model,) = scan_docker(tmp_path)
    assert model.path.name == "model-00001-of-00003.gguf"

    (next(folder.snapshots.iterdir()) / "model-00002-of-00003.gguf").resolve().unlink()

    assert scan_docker(tmp_path) == []


def test_what_llama_cpp_downloaded_is_found_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "ai_smollm2_135M-Q4_0.gguf").write_bytes(b"GGUF")
    (tmp_path / "ai_gemma3_latest.gguf").write_bytes(b"GGUF")
    (tmp_path / "somebody_model_v1.gguf").write_bytes(b"GGUF")
    (tmp_path / "ai_part_x.gguf.downloadInProgress").write_bytes(b"GGUF")

    assert names(tmp_path) == ["docker.io/ai/gemma3:latest", "docker.io/ai/smollm2:135M-Q4_0"]
    found = find_docker(tmp_path, parse_docker_name("somebody/model:v1"))
    assert found is not None and found.path == tmp_path / "somebody_model_v1.gguf"
    assert find_docker(tmp_path, parse_docker_name("ghcr.io/somebody/model:v1")) is None
    write_artifact(tmp_path, SMOL, "135M-Q4_0", MODEL)
    newer = find_docker(tmp_path, parse_docker_name("smollm2:135M-Q4_0"))
    assert newer is not None and newer.path.name == "model.gguf"


def test_what_is_not_whole_or_has_no_name_is_not_listed(tmp_path: Path) -> None:
    folder = write_artifact(tmp_path, SMOL, "good", MODEL)
    (folder.blobs / ("b" * 64 + ".incomplete")).write_bytes(b"GGUF")
    (folder.snapshots / ("c" * 64)).mkdir()
    for reference, digest in (("empty", ""), ("out", "../../.."), ("gone", "d" * 64), ("bare", "c" * 64)):
        folder.ref(reference).write_text(digest)
    os.mkfifo(folder.ref("pipe"))
    (folder.ref("good").with_name(".good.123")).write_text(folder.ref("good").read_text())
    for strange in ("x", "docker.io+..+x", "UPPER+a", "+", "a+b+"):
        write_artifact(tmp_path, strange.replace("+", "/", 1), "t", MODEL)
    (tmp_path / "docker" / "r.io+link").symlink_to(folder.folder)

    assert names(tmp_path) == [f"{SMOL}:good"]
    assert scan_docker(tmp_path / "missing") == []


def test_a_removed_tag_leaves_what_others_need(tmp_path: Path) -> None:
    write_artifact(tmp_path, SMOL, "one", {"model.gguf": b"GGUF one", "mmproj.gguf": b"GGUF eyes"})
    write_artifact(tmp_path, SMOL, "two", {"model.gguf": b"GGUF two", "mmproj.gguf": b"GGUF eyes"})
    write_artifact(tmp_path, SMOL, "again", {"model.gguf": b"GGUF two", "mmproj.gguf": b"GGUF eyes"})

    assert remove_docker(tmp_path, DockerName("docker.io", "ai/smollm2", "one")) == 8
    assert remove_docker(tmp_path, DockerName("docker.io", "ai/smollm2", "two")) == 0
    assert (names(tmp_path), blobs(tmp_path)) == ([f"{SMOL}:again"], [b"GGUF eyes", b"GGUF two"])
    assert remove_docker(tmp_path, DockerName("docker.io", "ai/smollm2", "again")) == 17

    assert (names(tmp_path), blobs(tmp_path)) == ([], [])


def test_a_removed_tag_takes_what_it_named_before(tmp_path: Path) -> None:
    write_artifact(tmp_path, SMOL, "latest", {"model.gguf": b"GGUF old"})
    write_artifact(tmp_path, SMOL, "latest", {"model.gguf": b"GGUF newer"})

    assert remove_docker(tmp_path, parse_docker_name("smollm2")) == 18

    assert blobs(tmp_path) == []


def test_what_a_download_left_goes_too_but_not_while_it_goes_on(tmp_path: Path) -> None:
    folder = write_artifact(tmp_path, SMOL, "good", MODEL)
    (folder.blobs / ("b" * 64 + ".incomplete")).write_bytes(b"GGUF a part")
    folder.locks.mkdir(parents=True)
    with FileLock(folder.locks / f"{'c' * 64}.lock"):
        with pytest.raises(ModelNotFound):
            remove_docker(tmp_path, parse_docker_name(f"{SMOL}:other"))
        assert blobs(tmp_path) == [b"GGUF a part", b"GGUF smol"]

    assert remove_docker(tmp_path, parse_docker_name(f"{SMOL}:other")) == 11

    assert blobs(tmp_path) == [b"GGUF smol"]
    with pytest.raises(ModelNotFound, match="is not in the cache"):
        remove_docker(tmp_path, parse_docker_name(f"{SMOL}:other"))


def test_llama_cpps_own_file_is_removed_by_its_name(tmp_path: Path) -> None:
    for name in ("ai_smollm2_latest.gguf", "ai_smollm2_latest.gguf.etag", "ai_other_latest.gguf", "mine.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")

    assert remove_docker(tmp_path, parse_docker_name("smollm2")) == 4

    assert sorted(path.name for path in tmp_path.iterdir()) == ["ai_other_latest.gguf", "mine.gguf"]


def test_nothing_outside_is_removed(tmp_path: Path) -> None:
    cache, outside = tmp_path / "cache", tmp_path / "outside"
    outside.mkdir()
    precious = outside / ("e" * 64)
    precious.write_bytes(b"GGUF")
    folder = write_artifact(cache, SMOL, "latest", MODEL)
    snapshot = next(folder.snapshots.iterdir())
    (snapshot / "mmproj.gguf").symlink_to(precious)
    (folder.snapshots / ("f" * 64)).symlink_to(outside)
    (snapshot / "up").symlink_to("..")

    remove_docker(cache, parse_docker_name("smollm2"))
    assert precious.exists()

    folder.blobs.rename(tmp_path / "blobs")
    folder.blobs.symlink_to(outside)
    with pytest.raises(BadRequest, match="is a link"):
        remove_docker(cache, parse_docker_name("smollm2"))
    (cache / "docker" / "docker.io+ai+link").symlink_to(outside)
    with pytest.raises(BadRequest, match="is a link"):
        remove_docker(cache, parse_docker_name("link"))
    assert precious.exists()


@pytest.mark.parametrize(
    ("name", "endpoint", "address"),
    [
        ("smollm2", "", "https://registry-1.docker.io"),
        ("ghcr.io/a/b", "", "https://ghcr.io"),
        ("r.example:8443/b", "", "https://r.example:8443"),
        ("localhost:5000/b", "", "http://localhost:5000"),
        ("127.0.0.1:5000/b", "", "http://127.0.0.1:5000"),
        ("localhost.example/b/c", "", "https://localhost.example"),
        ("smollm2", "https://mirror.example/", "https://mirror.example"),
        ("smollm2", "http://127.0.0.1:80", "http://127.0.0.1:80"),
    ],
)
def test_a_registry_is_asked_over_https_but_for_this_machine(name: str, endpoint: str, address: str) -> None:
    assert registry_address(parse_docker_name(name), endpoint) == address


@pytest.mark.parametrize(
    "endpoint", ["http://mirror.example", "mirror.example", "http://localhost:80@evil.example", "ftp://x"]
)
def test_no_other_address_is_asked(endpoint: str) -> None:
    with pytest.raises(BadRequest, match="no https address"):
        registry_address(parse_docker_name("smollm2"), endpoint)
