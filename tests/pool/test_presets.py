"""Preset files: what is read from them, and what a mistake in one costs."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamaherd.pool import BadRequest, read_presets
from llamaherd.pool.presets import PresetFile, parse_presets

REFERENCE = """\
version = 1

; settings of all
[*]
c = 8192
n-gpu-layers = 8

[ggml-org/MY-MODEL-GGUF:q8_0]
; string value
chat-template = chatml
n-gpu-layers = 123  # more
jinja = true
c = 4096
LLAMA_ARG_CACHE_RAM = 0
model-draft = ./my-models/draft.gguf
model-draft = /Users/abc/my-models/draft.gguf

[custom_model]
model = /Users/abc/my-awesome-model-Q4_K_M.gguf
"""


def pairs(file: PresetFile, name: str) -> dict[str, str]:
    (preset,) = [preset for preset in file.presets if preset.name == name]
    return {setting.key: setting.value for setting in preset.settings}


def test_a_file_of_the_reference_is_read() -> None:
    file = parse_presets(REFERENCE, "p.ini")

    assert [(setting.key, setting.value) for setting in file.everyone] == [("c", "8192"), ("n-gpu-layers", "8")]
    assert [preset.name for preset in file.presets] == ["ggml-org/MY-MODEL-GGUF:Q8_0", "custom_model"]
    assert pairs(file, "ggml-org/MY-MODEL-GGUF:Q8_0") == {
        "chat-template": "chatml",
        "n-gpu-layers": "123",
        "jinja": "true",
        "c": "4096",
        "LLAMA_ARG_CACHE_RAM": "0",
        "model-draft": "/Users/abc/my-models/draft.gguf",
    }
    assert not file.warnings


def test_a_setting_knows_its_line() -> None:
    assert [setting.place for setting in parse_presets("[*]\r\na = 1\r\rb=2\n", "x.ini").everyone] == [
        "x.ini:2",
        "x.ini:4",
    ]


def test_keys_ahead_of_every_section_make_a_default_model() -> None:
    assert pairs(parse_presets("model = a.gguf\n[b]\nmodel=b.gguf", ""), "default") == {"model": "a.gguf"}
    assert not parse_presets("version = 1\n", "").presets


@pytest.mark.parametrize(
    ("line", "value"),
    [("k = a b", "a b"), ("k=a;b", "a"), ("k = # none", ""), ("k =", ""), ("k = =", "="), ("\tk\t=\ta\t; c", "a")],
)
def test_a_value_ends_at_a_comment_and_has_no_spaces_around_it(line: str, value: str) -> None:
    assert pairs(parse_presets(f"[m]\n{line}\n", ""), "m") == {"k": value}


def test_the_later_of_two_spellings_stands_last() -> None:
    (preset,) = parse_presets("[m]\nc = 1\nctx-size = 2\nc = 3\n", "").presets

    assert [(setting.key, setting.value) for setting in preset.settings] == [("ctx-size", "2"), ("c", "3")]


def test_a_second_section_of_a_name_replaces_the_first_and_is_told() -> None:
    file = parse_presets("[a/b:q8_0]\nc = 1\n[a/b:Q8_0]\nb = 2\n", "p.ini")

    assert pairs(file, "a/b:Q8_0") == {"b": "2"}
    assert file.warnings == ("p.ini:3: [a/b:Q8_0] stands a second time and replaces p.ini:1",)


@pytest.mark.parametrize("line", ["what", "= 3", "1a = 2", "[", "[]", "[a] b", "[a", "key: value", "\x00"])
def test_a_line_that_means_nothing_costs_its_section_alone(line: str) -> None:
    file = parse_presets(f"[a]\nc = 1\n{line}\n[b]\nc = 2\n", "p.ini")

    assert [(preset.name, preset.error.partition(" ")[0]) for preset in file.presets] == [("a", "p.ini:3:"), ("b", "")]


def test_a_line_that_means_nothing_is_told_by_its_first_word() -> None:
    file = parse_presets("[a]\nhf-token: hf_secret\n[b]\n= hf_secret\n", "p.ini")

    assert [preset.error for preset in file.presets] == [
        "p.ini:2: 'hf-token' ... is no [section] and no key = value",
        "p.ini:4: '=' ... is no [section] and no key = value",
    ]


def test_a_line_that_means_nothing_for_all_models_is_an_error() -> None:
    with pytest.raises(BadRequest, match=r"p\.ini:2: 'what' .* of all models"):
        parse_presets("[*]\nwhat\n", "p.ini")


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "p.ini"
    with pytest.raises(BadRequest, match="cannot be read: No such file"):
        read_presets(path)
    with pytest.raises(BadRequest, match="Is a directory"):
        read_presets(tmp_path)
    with pytest.raises(BadRequest, match="null byte"):
        read_presets(Path("a\0b"))
    path.write_bytes(b"[a]\nb = \xff\n")
    with pytest.raises(BadRequest, match=r"p\.ini:2: this is not UTF-8"):
        read_presets(path)
    path.write_bytes(b" " * (16 * 1024 * 1024 + 1))
    with pytest.raises(BadRequest, match="is over"):
        read_presets(path)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "p.ini"
    path.write_bytes(b"\xef\xbb\xbf[a]\nb = 1\n")

    assert pairs(read_presets(path), "a") == {"b": "1"}


@given(st.text(alphabet=st.sampled_from("[]*=;#\r\n\t abc0_.-:/\x00é"), max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        file = parse_presets(text, "p.ini")
    except BadRequest:
        return
    names = [preset.name for preset in file.presets]
    assert len(set(names)) == len(names)
    for preset in file.presets:
        assert len({setting.key for setting in preset.settings}) == len(preset.settings)
