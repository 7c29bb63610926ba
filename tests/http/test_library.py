"""The catalogue behind a server: downloads, deletions, reloads and changes that are taken up by themselves."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from herding import wait_gone
from hub_cache import write_repo
from live_front import LiveFront, say
from llamaherd.http.grants import Grant
from llamaherd.http.library import Library
from llamaherd.http.presets import PresetOptions
from llamaherd.http.security import ApiKeys, Security
from llamaherd.pool import Caches, Catalog, ModelSpec, Pool, Sources, gather, scan_cache
from stand_in_hub import Fault, StandInHub
from tiny_gguf import tiny_model

CONTENT = b"GGUF" + os.urandom(100_000)
NAME = "u/r:Q8_0"

Start = Callable[..., AbstractContextManager[LiveFront]]


def read(sources: Sources) -> Catalog:
    return gather(sources, PresetOptions().configure)


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody is logged in, and settings come from files alone."""
    for name in os.environ:
        if name.startswith(("LLAMA_ARG_", "HF_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    with StandInHub() as hub:
        hub.add("u/r", {"m-Q8_0.gguf": CONTENT, "m-Q2_K.gguf": b"GGUF two"})
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def start(cache: Path, tmp_path: Path) -> Start:
    """Starts a server over the test's cache, with a preset file if there is one."""

    def start(*given: ModelSpec, watch: bool = False, **settings: Any) -> LiveFront:
        presets = tmp_path / "p.ini"
        sources = Sources(given=given, cache=cache, presets=presets if presets.exists() else None)
        library = Library(sources, read, Caches(cache, cache), watch=watch, watch_seconds=0.05)
        catalog = read(sources)
        library.take(catalog)
        return LiveFront(*catalog.models, library=library, **settings)

    return start


def models(front: LiveFront, reload: bool = False) -> dict[str, Any]:
    answer = httpx2.get(
        f"{front.url}/models", params={"reload": "1"} if reload else None, timeout=30
    ).raise_for_status()
    return {model["id"]: model for model in answer.json()["data"]}


def post(front: LiveFront, path: str, **body: Any) -> httpx2.Response:
    return httpx2.post(f"{front.url}{path}", json=body, timeout=30)


def delete(front: LiveFront, model: str) -> httpx2.Response:
    return httpx2.delete(f"{front.url}/models", params={"model": model}, timeout=30)


def until_listed(front: LiveFront, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Return the list once it is as wanted; the test's timeout is the deadline."""
    while not holds(listed := models(front)):
        pass
    return listed


def test_a_model_is_downloaded_and_then_one_of_the_models(start: Start, hub: StandInHub) -> None:
    with start() as front:
        assert post(front, "/models", model=NAME).json() == {"success": True}
        listed = until_listed(front, lambda listed: "path" in listed.get(NAME, {}))

    model = listed[NAME]
    assert (model["source"], model["can_remove"], model["status"]["value"]) == ("cache", True, "unloaded")
    assert list(listed) == [NAME]


def test_a_download_is_in_the_list_with_its_progress_and_unload_cancels_it(start: Start, hub: StandInHub) -> None:
    hub.fault = Fault(hold=threading.Event())
    with start() as front:
        post(front, "/models", model=NAME).raise_for_status()
        state = models(front)[NAME]["status"]
        assert state["value"] == "downloading"
        ((url, progress),) = state["progress"].items()
        assert url.endswith("/m-Q8_0.gguf") and progress["total"] == len(CONTENT)
        twice = post(front, "/models", model=NAME)
        assert post(front, "/models/unload", model=NAME).json() == {"success": True}
        until_listed(front, lambda listed: not listed)

    assert (twice.status_code, "is being downloaded already" in twice.text) == (400, True)


@pytest.mark.parametrize(
    ("model", "status", "words"),
    [
        ("", 400, "non-empty"),
        ("../../etc", 400, "no model name"),
        ("u/missing", 400, "no repository u/missing"),
        ("u/r:Q4_0", 400, "has not a GGUF file of the quant"),
    ],
)
def test_what_cannot_be_downloaded_is_refused(
    start: Start, hub: StandInHub, model: str, status: int, words: str
) -> None:
    with start() as front:
        answer = post(front, "/models", model=model)

    assert (answer.status_code, words in answer.json()["error"]["message"]) == (status, True)


def test_a_hub_that_is_asked_too_often_is_503_with_the_time_to_wait(start: Start, hub: StandInHub) -> None:
    hub.fault = Fault(status=429, retry_after="17")
    with start() as front:
        answer = post(front, "/models", model=NAME)

    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "17")


def test_a_model_that_is_there_already_is_refused(start: Start, hub: StandInHub, cache: Path) -> None:
    write_repo(cache, "u/r", ["m-Q8_0.gguf"])
    with start() as front:
        answer = post(front, "/models", model=NAME)

    assert (answer.status_code, "already exists" in answer.text) == (400, True)


def test_a_model_of_the_cache_is_deleted(start: Start, cache: Path) -> None:
    write_repo(cache, "u/r", ["m-Q8_0.gguf", "m-Q2_K.gguf"])
    with start() as front:
        assert delete(front, NAME).json() == {"success": True}
        assert list(models(front)) == ["u/r:Q2_K"]

    assert [model.name for model in scan_cache(cache)] == ["u/r:Q2_K"]


def test_a_download_that_is_deleted_is_cancelled_and_leaves_nothing(start: Start, hub: StandInHub, cache: Path) -> None:
    hub.fault = Fault(hold=threading.Event())
    with start() as front:
        post(front, "/models", model=NAME).raise_for_status()
        pid = front.ask(lambda pool: pool.status(NAME).pid or 0)
        assert delete(front, NAME).json() == {"success": True}
        assert models(front) == {}

    assert wait_gone([pid]) == []
    assert not list(cache.rglob("*.incomplete"))


def test_what_is_not_of_the_cache_cannot_be_deleted(start: Start) -> None:
    with start(ModelSpec(name="m", engine="fake")) as front:
        own, unknown, none = delete(front, "m"), delete(front, "u/x"), delete(front, "")

    assert (own.status_code, "is not from the cache" in own.text) == (400, True)
    assert [unknown.status_code, none.status_code] == [400, 400]


def test_a_reload_takes_up_what_has_changed_and_lets_the_rest_run(start: Start, cache: Path, tmp_path: Path) -> None:
    write_repo(cache, "u/r", ["m-Q8_0.gguf"])
    with start(ModelSpec(name="m", engine="fake")) as front:
        assert post(front, "/v1/chat/completions", model="m", **say("hi")).status_code == 200
        pid = front.ask(lambda pool: pool.status("m").pid)
        write_repo(cache, "u/r", ["m-Q2_K.gguf"])
        assert list(models(front)) == ["m", NAME]
        assert list(models(front, reload=True)) == ["m", "u/r:Q2_K", NAME]
        assert front.ask(lambda pool: pool.status("m").pid) == pid


def test_a_source_that_cannot_be_read_changes_nothing(start: Start, tmp_path: Path) -> None:
    presets = tmp_path / "p.ini"
    presets.write_text("[m]\nhf-repo = u/r\n")
    with start() as front:
        presets.write_bytes(b"\xff")
        answer = httpx2.get(f"{front.url}/models?reload=1", timeout=30)
        assert (answer.status_code, "p.ini:1: this is not UTF-8" in answer.text) == (400, True)
        assert str(tmp_path) not in answer.text
        assert list(models(front)) == ["m"]


def test_a_model_that_cannot_be_deleted_is_told_without_its_folder(start: Start, cache: Path, tmp_path: Path) -> None:
    write_repo(cache, "u/r", ["m-Q8_0.gguf"])
    repo = cache / "models--u--r"
    repo.symlink_to(repo.rename(tmp_path / "elsewhere"))
    with start() as front:
        answer = delete(front, NAME)

    assert (answer.status_code, "models--u--r is a link" in answer.text) == (400, True)
    assert str(tmp_path) not in answer.text


def test_a_preset_that_is_wrong_is_listed_as_failed(start: Start, tmp_path: Path) -> None:
    (tmp_path / "p.ini").write_text("[good]\nhf-repo = u/r\n[bad]\nhf-repo = u/r\nc = x\n")
    with start() as front:
        listed = models(front, reload=True)
        answer = post(front, "/v1/chat/completions", model="bad", **say("hi"))

    assert listed["bad"]["status"]["failed"] is True
    assert "failed" not in listed["good"]["status"]
    assert "p.ini:5: c: 'x' is not a whole number" in answer.text


def test_a_catalogue_that_is_watched_takes_up_changes_by_itself(start: Start, cache: Path, tmp_path: Path) -> None:
    with start(watch=True) as front:
        assert models(front) == {}
        write_repo(cache, "u/r", ["m-Q8_0.gguf"])
        until_listed(front, lambda listed: list(listed) == [NAME])


def test_a_reading_that_breaks_does_not_end_the_watch(cache: Path) -> None:
    errors = [OSError("gone while it was read")]

    def read_or_break(sources: Sources) -> Catalog:
        if errors:
            raise errors.pop()
        return read(sources)

    library = Library(Sources(cache=cache), read_or_break, Caches(cache, cache), watch=True, watch_seconds=0.05)
    with LiveFront(library=library) as front:
        until_listed(front, lambda _: not errors)
        write_repo(cache, "u/r", ["m-Q8_0.gguf"])
        until_listed(front, lambda listed: list(listed) == [NAME])


def test_a_download_that_ends_among_too_many_events_is_taken_up(cache: Path) -> None:
    begun: list[int] = []
    gate = threading.Event()

    def read_slowly(sources: Sources) -> Catalog:
        begun.append(1)
        gate.wait(30)
        return read(sources)

    def tell(pool: Pool, others: int) -> None:
        events = pool._herd.events  # pyright: ignore[reportPrivateUsage]
        events.emit("a", "download_finished", {})
        for _ in range(others):
            events.emit("b", "download_progress", {})

    with LiveFront(library=Library(Sources(cache=cache), read_slowly, Caches(cache, cache))) as front:
        front.ask(lambda pool: tell(pool, 0))
        front.wait_until(lambda _: len(begun) == 1)
        front.ask(lambda pool: tell(pool, 2000))
        gate.set()
        front.wait_until(lambda _: len(begun) == 2)


@pytest.fixture
def hang(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Callable[[], int]]]:
    """From its call on, let whoever lists a folder of the cache wait, as on a network's file system whose server is
    gone; what it returns says how many do.
    """
    gone, back, iterdir = threading.Event(), threading.Event(), Path.iterdir
    asked: list[Path] = []

    def look(path: Path) -> Iterator[Path]:
        if gone.is_set() and path.is_relative_to(cache):
            asked.append(path)
            back.wait()
        return iterdir(path)

    def begin() -> Callable[[], int]:
        gone.set()
        return lambda: len(asked)

    monkeypatch.setattr(Path, "iterdir", look)
    yield begin
    back.set()


@pytest.mark.parametrize("work", ["watch", "reload", "remove"])
def test_the_end_does_not_wait_for_a_file_system_that_hangs(
    hang: Callable[[], Callable[[], int]], cache: Path, work: str
) -> None:
    write_repo(cache, "u/r", ["m-Q8_0.gguf"])
    sources = Sources(cache=cache)
    library = Library(sources, read, Caches(cache, cache), watch=work == "watch", watch_seconds=0.05)

    with LiveFront(*read(sources).models, library=library) as front:
        hung = hang()
        if work == "reload":
            front.start(library.reload)
        elif work == "remove":
            front.start(lambda pool: library.remove(pool, NAME))
        front.wait_until(lambda _: hung() > 0)


def test_without_management_nothing_is_downloaded_deleted_or_reloaded(start: Start) -> None:
    with start(manage=False) as front:
        answers = [
            post(front, "/models", model=NAME),
            delete(front, NAME),
            httpx2.get(f"{front.url}/models?reload=1", timeout=30),
        ]

    assert [answer.status_code for answer in answers] == [403, 403, 403]


def chat(front: LiveFront, model: str) -> httpx2.Response:
    return post(front, "/v1/chat/completions", **say("hi", model=model, max_tokens=2))


def test_a_presets_model_is_downloaded_when_it_is_asked_for_and_answers(
    start: Start, hub: StandInHub, tmp_path: Path
) -> None:
    hub.add("u/tiny", {"t-Q8_0.gguf": tiny_model("random").read_bytes()})
    (tmp_path / "p.ini").write_text("[small]\nhf-repo = u/tiny\nc = 256\n[*]\ndedup-cache-models = 1\n")

    with start() as front:
        before = models(front)["small"]
        assert (before["status"]["value"], "path" in before) == ("unloaded", False)
        assert chat(front, "small").json()["usage"]["completion_tokens"] == 2
        listed = models(front, reload=True)
        assert list(listed) == ["small"]
        after = listed["small"]
        assert (after["status"]["value"], after["source"], after["can_remove"]) == ("loaded", "preset", False)
        assert chat(front, "u/tiny:Q8_0").status_code == 200  # the name that dedup-cache-models hides


def test_a_presets_download_is_listed_told_cancelled_by_unload_and_goes_on(
    start: Start, hub: StandInHub, tmp_path: Path
) -> None:
    hub.add("u/tiny", {"t-Q8_0.gguf": tiny_model("random").read_bytes()})
    hub.fault = Fault(hold=threading.Event())
    (tmp_path / "p.ini").write_text("[small]\nhf-repo = u/tiny\nc = 256\nload-on-startup = true\n")

    with start() as front:
        listed = until_listed(front, lambda listed: listed["small"]["status"].get("progress"))
        state = listed["small"]["status"]
        ((url, progress),) = state["progress"].items()
        assert (state["value"], url.endswith("/t-Q8_0.gguf"), progress["total"] > 0) == ("downloading", True, True)
        assert post(front, "/models/load", model="small").status_code == 400
        assert post(front, "/models/unload", model="small").json() == {"success": True}
        listed = until_listed(front, lambda listed: listed["small"]["status"]["value"] == "unloaded")
        assert "failed" not in listed["small"]["status"]
        hub.fault = Fault()
        assert chat(front, "small").status_code == 200


def test_why_a_presets_download_failed_is_in_the_answer_and_the_list(
    start: Start, hub: StandInHub, tmp_path: Path
) -> None:
    (tmp_path / "p.ini").write_text("[gone]\nhf-repo = u/missing\n[off]\nhf-repo = u/r:Q4_0\noffline = 1\n")

    with start() as front:
        gone, off = chat(front, "gone"), chat(front, "off")
        assert (gone.status_code, off.status_code) == (500, 500)
        assert "there is no repository u/missing on the hub, or it is private: then set HF_TOKEN" in gone.text
        assert "u/r:Q4_0 is not in the cache, and this is offline" in off.text
        hub.fault = Fault(status=429, retry_after="7")
        (tmp_path / "p.ini").write_text("[busy]\nhf-repo = u/r:Q4_0\n")
        models(front, reload=True)
        busy = chat(front, "busy")
        assert (busy.status_code, busy.headers["retry-after"]) == (503, "7")
        assert models(front)["busy"]["status"]["failed"] is True


def test_a_key_for_reading_alone_reloads_nothing(start: Start, cache: Path) -> None:
    keys = {"all": Grant(), "reader": Grant(read_only=True), "one": Grant(models=frozenset({"m"}))}
    with start(ModelSpec(name="m", engine="fake"), security=Security(keys=ApiKeys(keys))) as front:
        write_repo(cache, "u/new", ["m-Q8_0.gguf"])

        def ask(key: str) -> httpx2.Response:
            return httpx2.get(f"{front.url}/models?reload=1", headers={"X-Api-Key": key}, timeout=30)

        assert [ask(key).status_code for key in ("reader", "one")] == [403, 403]
        assert [model["id"] for model in ask("all").json()["data"]] == ["m", "u/new:Q8_0"]


def test_a_server_without_a_catalogue_says_so() -> None:
    with LiveFront(ModelSpec(name="m", engine="fake")) as front:
        answers = [post(front, "/models", model=NAME), delete(front, NAME)]
        assert list(models(front, reload=True)) == ["m"]

    assert [answer.status_code for answer in answers] == [403, 403]
