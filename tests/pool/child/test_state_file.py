"""Files of saved sequences: only whole ones are read, and only names inside the folder are taken."""

import os
from array import array
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamaherd.pool.child.engine import RequestError
from llamaherd.pool.child.state_file import Header, fingerprint, read_state, valid_name, write_state

TOKENS = array("i", [1, 2, 3, 400_000])
DATA = np.arange(1000, dtype=np.uint16).view(np.uint8)
HEADER = Header(model="m", settings="s", adapters=(("a", 0.5),), n_tokens=len(TOKENS), n_bytes=DATA.nbytes)


def refusal(folder: Path, name: str, most_tokens: int = 100) -> RequestError:
    with pytest.raises(RequestError) as caught:
        read_state(folder, name, most_tokens=most_tokens)
    return caught.value


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    size = write_state(tmp_path, "a.bin", HEADER, TOKENS, DATA)
    header, tokens, data, read = read_state(tmp_path, "a.bin", most_tokens=100)
    assert (header, tokens, data.tobytes()) == (HEADER, TOKENS, DATA.tobytes())
    assert size == read == (tmp_path / "a.bin").stat().st_size
    assert (tmp_path / "a.bin").stat().st_mode & 0o077 == 0, "prompts are nobody else's business"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"old")
    write_state(tmp_path, "a.bin", HEADER, TOKENS, DATA)
    assert read_state(tmp_path, "a.bin", most_tokens=100)[1] == TOKENS


def test_a_file_of_another_model_is_not_destroyed(tmp_path: Path) -> None:
    write_state(tmp_path, "a.bin", HEADER, TOKENS, DATA)
    with pytest.raises(RequestError, match="'a.bin' holds a slot of another model") as caught:
        write_state(tmp_path, "a.bin", msgspec.structs.replace(HEADER, model="other"), TOKENS, DATA)
    assert caught.value.code == "slot_file_of_another_model"
    assert read_state(tmp_path, "a.bin", most_tokens=100)[0] == HEADER
    write_state(tmp_path, "a.bin", msgspec.structs.replace(HEADER, settings="other"), TOKENS, DATA)


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.bin").mkdir()
    with pytest.raises(RequestError, match="'a.bin' cannot be saved") as caught:
        write_state(tmp_path, "a.bin", HEADER, TOKENS, DATA)
    assert caught.value.code == "slot_file_unwritable"
    assert os.listdir(tmp_path) == ["a.bin"]
    with pytest.raises(RequestError, match="No such file"):
        write_state(tmp_path / "gone", "a.bin", HEADER, TOKENS, DATA)


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 10**6), flip=st.integers(1, 255))
def test_a_changed_byte_is_found(tmp_path_factory: pytest.TempPathFactory, position: int, flip: int) -> None:
    folder = tmp_path_factory.mktemp("slots")
    write_state(folder, "a.bin", HEADER, TOKENS, DATA)
    whole = bytearray((folder / "a.bin").read_bytes())
    whole[position % len(whole)] ^= flip
    (folder / "a.bin").write_bytes(whole)
    assert refusal(folder, "a.bin").code in ("slot_file_invalid", "slot_file_too_long")


@pytest.mark.parametrize("length", [0, 5, 8, 11, 40, 150, 2000, -1])
def test_a_file_that_ends_too_early_is_refused(tmp_path: Path, length: int) -> None:
    write_state(tmp_path, "a.bin", HEADER, TOKENS, DATA)
    whole = (tmp_path / "a.bin").read_bytes()
    (tmp_path / "a.bin").write_bytes(whole[:length])
    assert refusal(tmp_path, "a.bin").code == "slot_file_invalid"


def test_a_file_with_more_behind_it_is_refused(tmp_path: Path) -> None:
    write_state(tmp_path, "a.bin", HEADER, TOKENS, DATA)
    with (tmp_path / "a.bin").open("ab") as file:
        file.write(b"x")
    assert "bytes instead of" in str(refusal(tmp_path, "a.bin"))


def test_other_files_are_not_taken_for_saved_slots(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"GGUF" + bytes(5000))
    (tmp_path / "link").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    assert "was not saved by this program" in str(refusal(tmp_path, "a.bin"))
    assert refusal(tmp_path, "gone").code == "slot_file_not_found"
    assert refusal(tmp_path, "link").code == "slot_file_unreadable"
    assert refusal(tmp_path, "pipe").code == "slot_file_invalid"
    assert refusal(tmp_path, "folder").code in ("slot_file_invalid", "slot_file_unreadable")


def next_descriptor() -> int:
    descriptor = os.open(os.devnull, os.O_RDONLY)
    os.close(descriptor)
    return descriptor


def test_a_folder_in_the_place_of_a_file_is_not_left_open(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    before = next_descriptor()
    with pytest.raises(RequestError):
        write_state(tmp_path, "folder", HEADER, TOKENS, DATA)
    refusal(tmp_path, "folder")
    assert next_descriptor() == before


def test_more_tokens_than_the_context_has_are_refused(tmp_path: Path) -> None:
    write_state(tmp_path, "a.bin", HEADER, TOKENS, DATA)
    assert refusal(tmp_path, "a.bin", most_tokens=3).code == "slot_file_too_long"


@pytest.mark.parametrize("name", ["a", "slot 1.bin", "größe.bin", "x" * 200])
def test_plain_names_are_taken(name: str) -> None:
    assert valid_name(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/etc/passwd", "a\\b", "a\0b", ".hidden", "x" * 201, "a\nb", "\ud800", "c:x"]
)
def test_names_that_could_lead_elsewhere_are_not(name: str) -> None:
    assert not valid_name(name)


def test_a_fingerprint_tells_files_apart(tmp_path: Path) -> None:
    one, other, same = (tmp_path / name for name in ("one", "other", "same"))
    one.write_bytes(bytes(10_000))
    same.write_bytes(bytes(10_000))
    other.write_bytes(bytes(9_000) + b"x" + bytes(999))
    assert fingerprint(str(one)) == fingerprint(str(same)) != fingerprint(str(other))


def test_a_header_that_nests_too_deep_is_a_damaged_file(tmp_path: Path) -> None:
    header = b'{"more":' + b"[" * 60_000
    (tmp_path / "deep").write_bytes(b"llamaKV\x01" + len(header).to_bytes(4, "little") + header)
    with pytest.raises(RequestError, match="its header is wrong"):
        read_state(tmp_path, "deep", most_tokens=100)
