"""The Hugging Face cache: where it is, what is listed of it, and what a deletion takes and leaves."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from hub_cache import COMMIT, write_repo
from llamaherd.pool import (
    BadRequest,
    Caches,
    HubName,
    ModelNotFound,
    Origin,
    cache_folder,
    docker_cache,
    find_cached,
    remove_cached,
    scan_cache,
)


def test_the_cache_is_where_the_first_variable_says() -> None:
    variables = {
        "LLAMA_CACHE": "/a",
        "HF_HUB_CACHE": "/b",
        "HUGGINGFACE_HUB_CACHE": "/c",
        "HF_HOME": "/d",
        "XDG_CACHE_HOME": "/e",
        "HOME": "/f",
    }
    found: list[str] = []
    for name in tuple(variables):
        found.append(str(cache_folder(variables)))
        del variables[name]

    assert found == ["/a", "/b", "/c", "/d/hub", "/e/huggingface/hub", "/f/.cache/huggingface/hub"]


def test_a_variable_that_is_empty_is_not_set() -> None:
    assert cache_folder({"LLAMA_CACHE": "", "HF_HUB_CACHE": "/b"}) == Path("/b")


@pytest.mark.parametrize("folder", [cache_folder, docker_cache])
def test_the_home_of_a_user_who_is_not_known_is_no_folder(folder: Callable[[Mapping[str, str]], Path]) -> None:
    with pytest.raises(BadRequest, match="LLAMA_CACHE begins with the home of a user who is not known here: '~no-such"):
        folder({"LLAMA_CACHE": "~no-such-user/models"})


def test_who_has_no_home_has_no_cache_and_is_told_what_to_set_once_one_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("LLAMA_CACHE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**30)  # as in a container that runs as anybody

    assert Caches.of_environment() == Caches(None, None)
    assert Caches.of_environment().scan() == []
    with pytest.raises(BadRequest, match="set LLAMA_CACHE to a folder"):
        Origin(repo="o/g").find()


def test_models_are_listed_by_repository_and_tag(tmp_path: Path) -> None:
    write_repo(tmp_path, "o/g", ["g-Q4_K_M.gguf", "g-Q8_0.gguf", "mmproj-g-f16.gguf", "README.md"])
    write_repo(tmp_path, "a/b", ["b.f16.gguf"])

    models = scan_cache(tmp_path)

    assert [(model.name, model.is_default) for model in models] == [
        ("a/b:F16", True),
        ("o/g:Q4_K_M", True),
        ("o/g:Q8_0", False),
    ]
    assert all(model.path.read_bytes()[:4] == b"GGUF" for model in models)
    assert [model.mmproj is not None for model in models] == [False, True, True]


def test_a_split_model_is_listed_once_it_is_whole(tmp_path: Path) -> None:
    parts = [f"q/g-Q8_0-0000{part}-of-00003.gguf" for part in (1, 2, 3)]
    repo = write_repo(tmp_path, "o/g", parts[:2])
    assert scan_cache(tmp_path) == []

    write_repo(tmp_path, "o/g", parts[2:])
    (model,) = scan_cache(tmp_path)

    assert model.name == "o/g:Q8_0"
    assert model.path == repo / "snapshots" / COMMIT / parts[0]


def test_what_is_not_whole_or_not_current_is_not_listed(tmp_path: Path) -> None:
    repo = write_repo(tmp_path, "o/g", ["g-Q8_0.gguf"])
    (repo / "blobs" / "abc.incomplete").write_bytes(b"GGUF")
    link = repo / "snapshots" / COMMIT / "g-Q4_0.gguf"
    link.symlink_to("../../blobs/missing")
    old = repo / "snapshots" / ("b" * 40)
    old.mkdir()
    (old / "g-Q2_K.gguf").write_bytes(b"GGUF")

    assert [model.name for model in scan_cache(tmp_path)] == ["o/g:Q8_0"]


@pytest.mark.parametrize("ref", ["", "main", "../../../etc", "a" * 39, "\xff"])
def test_a_ref_that_is_no_commit_is_nothing(tmp_path: Path, ref: str) -> None:
    repo = write_repo(tmp_path, "o/g", ["g-Q8_0.gguf"])
    (repo / "refs" / "main").write_text(ref)

    assert scan_cache(tmp_path) == []


def test_a_pipe_in_the_place_of_a_ref_keeps_nobody_waiting(tmp_path: Path) -> None:
    folder = write_repo(tmp_path, "u/r", ["m-Q8_0.gguf"])
    (folder / "refs" / "main").unlink()
    os.mkfifo(folder / "refs" / "main")
    write_repo(tmp_path, "u/s", ["m-Q8_0.gguf"])

    assert [model.name for model in scan_cache(tmp_path)] == ["u/s:Q8_0"]


def test_links_that_lead_nowhere_or_round_in_circles_are_no_models(tmp_path: Path) -> None:
    snapshot = write_repo(tmp_path, "u/r", ["m-Q8_0.gguf"]) / "snapshots" / COMMIT
    (snapshot / "gone-Q4_0.gguf").symlink_to("../../blobs/missing")
    (snapshot / "self-Q4_1.gguf").symlink_to("self-Q4_1.gguf")
    (snapshot / "around").symlink_to(".")
    (snapshot / "up-Q5_0.gguf").symlink_to("..")
    (tmp_path / "models--u--loop").symlink_to("models--u--loop")

    assert [model.name for model in scan_cache(tmp_path)] == ["u/r:Q8_0"]


def test_a_removed_tag_leaves_what_its_links_lead_to_outside(tmp_path: Path) -> None:
    cache, mine = tmp_path / "cache", tmp_path / "mine.gguf"
    mine.write_bytes(b"GGUF mine")
    snapshot = write_repo(cache, "u/r", ["m-Q8_0.gguf"]) / "snapshots" / COMMIT
    (snapshot / "o-Q4_0.gguf").symlink_to(mine)
    assert [model.name for model in scan_cache(cache)] == ["u/r:Q8_0", "u/r:Q4_0"][::-1]

    remove_cached(cache, HubName("u/r", "Q4_0"))

    assert [model.name for model in scan_cache(cache)] == ["u/r:Q8_0"]
    assert mine.read_bytes() == b"GGUF mine"


def test_folders_that_are_no_repositories_are_passed_over(tmp_path: Path) -> None:
    for name in ("models--", "models--x", "models--..--x", "datasets--a--b", "models--a--b--c"):
        write_repo(tmp_path, "o/g", ["g-Q8_0.gguf"]).rename(tmp_path / name)
    (tmp_path / "models--f--f").write_text("")

    assert scan_cache(tmp_path) == []
    assert scan_cache(tmp_path / "missing") == []


def test_a_name_is_found_by_quant_by_default_and_by_file(tmp_path: Path) -> None:
    write_repo(tmp_path, "o/g", ["g-Q4_K_M.gguf", "g-Q8_0.gguf"])

    def found(tag: str = "", file: str = "") -> str | None:
        model = find_cached(tmp_path, HubName("o/g", tag), file)
        return None if model is None else model.path.name

    assert (found(), found("q8_0"), found("Q2_K")) == ("g-Q4_K_M.gguf", "g-Q8_0.gguf", None)
    assert (found(file="g-Q8_0.gguf"), found(file="../g-Q8_0.gguf")) == ("g-Q8_0.gguf", None)
    assert find_cached(tmp_path, HubName("o/other")) is None


def test_a_tag_is_removed_with_the_blobs_that_nothing_else_needs(tmp_path: Path) -> None:
    repo = write_repo(tmp_path, "o/g", ["g-Q4_0.gguf", "g-Q8_0.gguf", "copy/g-Q8_0.gguf"])
    shared = (repo / "snapshots" / COMMIT / "g-Q4_0.gguf").resolve()
    (repo / "snapshots" / COMMIT / "same-Q5_0.gguf").symlink_to(f"../../blobs/{shared.name}")

    assert remove_cached(tmp_path, HubName("o/g", "Q4_0")) == 0
    assert shared.exists()
    assert remove_cached(tmp_path, HubName("o/g", "q8_0")) > 0

    assert [model.name for model in scan_cache(tmp_path)] == ["o/g:Q5_0"]
    assert [path.name for path in (repo / "blobs").iterdir()] == [shared.name]


def test_a_repository_is_removed_as_a_whole(tmp_path: Path) -> None:
    write_repo(tmp_path, "o/g", ["g-Q4_0.gguf"])
    write_repo(tmp_path, "o/other", ["g-Q4_0.gguf"])

    assert remove_cached(tmp_path, HubName("o/g")) > 0

    assert [path.name for path in tmp_path.iterdir()] == ["models--o--other"]


def test_what_is_not_there_cannot_be_removed(tmp_path: Path) -> None:
    write_repo(tmp_path, "o/g", ["g-Q4_0.gguf"])

    for name in (HubName("o/x"), HubName("o/g", "Q8_0")):
        with pytest.raises(ModelNotFound, match="is not in the cache"):
            remove_cached(tmp_path, name)
    assert len(scan_cache(tmp_path)) == 1


def test_nothing_outside_the_repository_is_removed(tmp_path: Path) -> None:
    cache, outside = tmp_path / "cache", tmp_path / "outside"
    repo = write_repo(cache, "o/g", ["g-Q8_0.gguf"])
    outside.mkdir()
    (outside / "precious-Q4_0.gguf").write_bytes(b"GGUF")
    (repo / "snapshots" / COMMIT / "p-Q4_0.gguf").symlink_to(outside / "precious-Q4_0.gguf")
    (repo / "snapshots" / COMMIT / "folder").symlink_to(outside)

    remove_cached(cache, HubName("o/g", "Q4_0"))
    remove_cached(cache, HubName("o/g"))
    assert (outside / "precious-Q4_0.gguf").exists()

    (cache / "models--o--link").symlink_to(outside)
    with pytest.raises(BadRequest, match="is a link"):
        remove_cached(cache, HubName("o/link"))
    assert (outside / "precious-Q4_0.gguf").exists()
