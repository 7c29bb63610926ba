"""What is read out of content parts, and what is refused before anything decodes it."""

import base64
import struct
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamaherd.pool.child import media
from llamaherd.pool.child.engine import RequestError
from llamaherd.pool.child.media import Media, check_file, has_media, take_media
from pictures import RED, chunk, data_url, image_part, png, wave

MARK = "<mark>"


def jpeg(width: int, height: int, *, before: bytes = b"") -> bytes:
    """Return the beginning of a JPEG."""
    frame = struct.pack(">HBHHB", 17, 8, height, width, 3) + bytes(9)
    return b"\xff\xd8\xff\xe0\x00\x04ab" + before + b"\xff\xc2" + frame


def gif(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HH", width, height) + bytes(3)


def bmp(width: int, height: int, header: int = 40) -> bytes:
    size = struct.pack("<HH", width, height) if header == 12 else struct.pack("<ii", width, height)
    return b"BM" + bytes(12) + struct.pack("<I", header) + size


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def refused(*parts: Any) -> str:
    with pytest.raises(RequestError) as caught:
        take_media(user(*parts), MARK)
    return str(caught.value)


def refused_file(data: bytes, kind: str = "image") -> str:
    with pytest.raises(RequestError) as caught:
        check_file(Media("audio" if kind == "audio" else "image", data))
    return str(caught.value)


# --- parts ---


def test_each_file_leaves_a_marker_in_its_place() -> None:
    text, other = {"type": "text", "text": "what?"}, {"role": "system", "content": "be brief"}
    plain, found = take_media([other, *user(image_part(RED), text, image_part(png((0, 0, 9))))], MARK)
    assert plain[0] is other
    assert plain[1]["content"] == [{"type": "text", "text": MARK}, text, {"type": "text", "text": MARK}]
    assert found == (Media("image", RED), Media("image", png((0, 0, 9))))


def test_the_forms_in_which_clients_write_files() -> None:
    sound = wave()
    encoded = base64.b64encode(sound).decode()
    parts = [
        {"type": "image_url", "image_url": data_url(RED)},
        {"type": "image_url", "image_url": {"url": data_url(RED).replace("data:", "DATA:"), "detail": "low"}},
        {"type": "image_url", "image_url": {"url": "data:;base64," + base64.encodebytes(RED).decode()}},
        {"type": "image_url", "image_url": {"url": base64.b64encode(RED).decode()}},
        {"type": "image_url", "image_url": {"url": base64.urlsafe_b64encode(RED).decode().rstrip("=")}},
        {"type": "input_audio", "input_audio": {"data": encoded, "format": "wav"}},
        {"type": "input_audio", "input_audio": {"url": encoded}},
        {"type": "input_audio", "input_audio": {"data": f"data:audio/wav;base64,{encoded}"}},
    ]
    _, found = take_media(user(*parts), MARK)
    assert [one.data for one in found] == [*[RED] * 5, *[sound] * 3]
    assert [one.kind for one in found] == ["image"] * 5 + ["audio"] * 3


def test_chats_without_files_are_told_apart() -> None:
    assert has_media(user(image_part(RED)))
    assert not has_media(user({"type": "text", "text": "image_url"}))
    assert not has_media([{"role": "user", "content": "image_url"}, {"role": "user"}, {"role": "user", "content": [1]}])


@pytest.mark.parametrize("url", ["http://127.0.0.1/x.png", "https://example.org/x.png", "file:///etc/passwd", "x.png"])
def test_nothing_is_fetched(url: str) -> None:
    assert "nothing is fetched" in refused({"type": "image_url", "image_url": {"url": url}})


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"type": "image_url"}, "must have a text 'url'"),
        ({"type": "image_url", "image_url": {"url": 5}}, "must have a text 'url'"),
        ({"type": "image_url", "image_url": {}}, "must have a text 'url'"),
        ({"type": "input_audio", "input_audio": {"text": "x"}}, "must have a text 'data'"),
        ({"type": "image_url", "image_url": "data:image/png,plain"}, "must be base64"),
        ({"type": "image_url", "image_url": "data:image/png;base64,@@@@"}, "not valid base64"),
        ({"type": "image_url", "image_url": "data:image/png;base64,äöü"}, "not valid base64"),
        ({"type": "image_url", "image_url": "data:image/png;base64,"}, "no format"),
        ({"type": "image_url", "image_url": data_url(wave())}, "no format"),
        ({"type": "input_audio", "input_audio": {"data": base64.b64encode(RED).decode()}}, "no format"),
    ],
)
def test_parts_that_say_nothing_are_refused(part: Any, reason: str) -> None:
    assert reason in refused(part)


def test_there_are_bounds_to_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "more than 32 images" in refused(*[image_part(RED)] * 33)
    monkeypatch.setattr(media, "MOST_PIXELS_TOGETHER", 1500)
    assert "1500 pixels together" in refused(image_part(RED), image_part(RED))
    monkeypatch.setattr(media, "MOST_BYTES", 30)
    assert "more than 30 bytes" in refused(image_part(RED))


# --- files ---


@pytest.mark.parametrize(
    "data", [png((1, 2, 3), 60, 40), jpeg(60, 40), gif(60, 40), bmp(60, 40), bmp(60, -40), bmp(60, 40, 12)]
)
def test_the_size_is_read_from_the_header(data: bytes) -> None:
    assert check_file(Media("image", data)) == 2400


def test_a_jpegs_size_is_that_of_its_first_frame() -> None:
    thumbnail = b"\xff\xe1" + struct.pack(">H", 2 + len(jpeg(9, 9))) + jpeg(9, 9)
    assert check_file(Media("image", jpeg(60, 40, before=thumbnail + b"\xff\xff\xff\xc4\x00\x04xy"))) == 2400


@pytest.mark.parametrize("make", [png, jpeg, gif, bmp])
def test_pictures_that_would_fill_the_memory_are_refused(make: Any) -> None:
    def of(width: int, height: int) -> bytes:
        data: bytes = png((0, 0, 0), 1, 1, claimed=(width, height)) if make is png else make(width, height)
        return data

    assert "has more than 64000000" in refused_file(of(30000, 30000))
    assert "too narrow" in refused_file(of(20000, 3))
    assert "no pixels" in refused_file(of(0, 40))


def test_a_small_picture_that_unpacks_to_much_more_is_refused() -> None:
    bomb = zlib.compress(bytes(64 * 1024 * 1024))
    data = png((0, 0, 0), 8, 8)
    head, tail = data[: data.index(b"IDAT") - 4], chunk(b"IEND", b"")
    assert len(bomb) < 100_000
    assert "unpacks to far more" in refused_file(head + chunk(b"IDAT", bomb) + tail)
    halves = chunk(b"IDAT", bomb[:100]) + chunk(b"tEXt", b"x") + chunk(b"IDAT", bomb[100:])
    assert "unpacks to far more" in refused_file(head + halves + tail)
    assert "damaged" in refused_file(head + chunk(b"IDAT", b"no zlib") + tail)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"RIFF....WEBPVP8 ",
        b"%PDF-1.4",
        b"P6 1 1 255 abc",
        b"8BPS",
        b"<svg/>",
        RED[:20],
        b"BM",
        bmp(1, 1, 99),
        b"GIF89a",
    ],
)
def test_other_formats_and_torn_headers_are_refused(data: bytes) -> None:
    assert "no format" in refused_file(data)


def tagged(size: int, *, footer: bool = False) -> bytes:
    """Return an ID3 tag of that many bytes after its head."""
    parts = bytes(size >> shift & 0x7F for shift in (21, 14, 7, 0))
    return b"ID3\x04\x00" + (b"\x10" if footer else b"\x00") + parts + bytes(size + (10 if footer else 0))


MPEG = b"\xff\xfb\x90\x64" + bytes(400)


def test_sounds_are_told_by_what_they_are() -> None:
    for data in (wave(), wave(kind=3), wave(kind=0xFFFE, more=bytes(8) + b"\x01\x00" + bytes(14)), MPEG):
        assert check_file(Media("audio", data)) == 0
    for tag in (tagged(0), tagged(300), tagged(20, footer=True), tagged(5) + tagged(7)):
        assert check_file(Media("audio", tag + MPEG)) == 0
        for other in (b"fLaC" + bytes(100), b"OggS" + bytes(100), b"", b"\xff"):
            assert "no format" in refused_file(tag + other, "audio")
    assert "no format" in refused_file(b"fLaC" + bytes(100), "audio")
    for kind in (2, 0x11, 0x55, 0xFFFE):
        assert "compressed" in refused_file(wave(kind=kind), "audio")


def test_sounds_are_bounded_by_what_they_last() -> None:
    assert "impossible" in refused_file(wave(rate=1), "audio")
    assert "impossible" in refused_file(wave(channels=0, samples=0), "audio")
    assert "longer than" in refused_file(wave(samples=1, rate=4000) + bytes(4000 * 2 * 1800), "audio")
    assert "does not say" in refused_file(b"RIFF....WAVE", "audio")
    assert "does not say" in refused_file(b"RIFF....WAVEdata" + bytes(100) + wave()[12:], "audio")
    assert "more than" in refused_file(MPEG + bytes(media.MOST_MP3_BYTES), "audio")


def test_an_mp3_is_not_believed_how_long_it_is() -> None:
    for word in (b"Xing", b"Info"):
        lie = word + b"\x00\x00\x00\x01\xff\xff\xff\xff"
        assert "says that it lasts" in refused_file(MPEG + lie, "audio")
        assert "says that it lasts" in refused_file(MPEG + word + lie, "audio")
        assert check_file(Media("audio", MPEG + word + b"\x00\x00\x00\x01\x00\x00\x10\x00")) == 0
        assert check_file(Media("audio", MPEG + word + b"\x00\x00\x00\x00\xff\xff\xff\xff")) == 0


@given(
    st.binary(max_size=200), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"GIF89a", b"RIFF"])
)
def test_any_bytes_are_judged_and_nothing_else_is_raised(data: bytes, start: bytes) -> None:
    for kind in ("image", "audio"):
        try:
            check_file(Media("image" if kind == "image" else "audio", start + data))
        except RequestError as error:
            assert error.code in ("invalid_media", "media_format")


@given(
    st.recursive(
        st.none() | st.booleans() | st.text(max_size=5),
        lambda some: (
            st.lists(some, max_size=3)
            | st.dictionaries(st.sampled_from(["type", "image_url", "url", "input_audio", "data"]), some, max_size=3)
        ),
    )
)
def test_any_content_is_judged_and_nothing_else_is_raised(content: Any) -> None:
    messages = [{"role": "user", "content": content}]
    try:
        plain, found = take_media(messages, MARK)
    except RequestError:
        assert has_media(messages)
    else:
        assert not found
        assert len(plain) == 1
