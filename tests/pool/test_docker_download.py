"""What a worker in download mode does with a registry that behaves and with one that does not: real sockets, and never
anything in the cache's list that is not whole.
"""

import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llamaherd.pool import CachedModel, parse_docker_name, scan_docker
from llamaherd.pool.child.download import run_download
from llamaherd.pool.child.oci import MAX_MANIFEST
from llamaherd.pool.docker import registry_address
from llamaherd.transport.messages import Download
from patience import ended
from stand_in_registry import (
    DOCKER_INDEX,
    DOCKER_MANIFEST,
    LICENSE,
    MMPROJ,
    OCI_MANIFEST,
    TEMPLATE,
    Layer,
    RegistryFault,
    StandInRegistry,
    digest_of,
)

CONTENT = b"GGUF" + os.urandom(200_000)
EYES = b"GGUF eyes"
REPO = "ai/smollm2"
TAG = "135M-Q4_0"
ANY = "application/octet-stream"
MODELPACK = "application/vnd.cncf.model.weight.v1.raw"

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def registry() -> Iterator[StandInRegistry]:
    with StandInRegistry() as registry:
        registry.add(REPO, TAG, [Layer(CONTENT), Layer(b"Apache", LICENSE)])
        yield registry


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def download(registry: StandInRegistry, cache: Path) -> Run:
    """Runs a download and returns its last report, with all reports under ``reports``."""

    def run(name: str = f"{REPO}:{TAG}", cancelled: threading.Event | None = None, **more: Any) -> dict[str, Any]:
        reports: list[dict[str, Any]] = []
        report: Callable[[Any], None] = reports.append
        found = parse_docker_name(f"{registry.host}/{name}")
        command = Download(
            model=str(found),
            registry=found.registry,
            repo=found.repo,
            tag=found.reference,
            cache=str(cache),
            endpoint=registry_address(found),
            **more,
        )
        run_download(command, report, cancelled or threading.Event(), pause=0.01)
        return {**reports[-1], "reports": reports}

    return run


def listed(cache: Path) -> list[str]:
    return [model.name.partition("/")[2] for model in scan_docker(cache)]


def only(cache: Path) -> CachedModel:
    (model,) = scan_docker(cache)
    return model


def unfinished(cache: Path) -> list[Path]:
    return list(cache.rglob("*.incomplete"))


# --- a registry that behaves ---


def test_a_model_arrives_and_is_listed_under_its_name(download: Run, registry: StandInRegistry, cache: Path) -> None:
    assert download()["result"] == "download_finished"

    model = only(cache)
    assert model.name == f"{registry.host}/{REPO}:{TAG}"
    assert (model.path.name, model.path.read_bytes(), model.mmproj) == ("model.gguf", CONTENT, None)
    assert unfinished(cache) == []
    assert not registry.pulls(b"Apache")


def test_progress_is_told_from_plan_to_end(download: Run, registry: StandInRegistry) -> None:
    reports = download()["reports"]

    url = f"{registry.url}/v2/{REPO}/blobs/{digest_of(CONTENT)}"
    assert reports[0] == {"plan": {url: len(CONTENT)}}
    steps = [report["downloaded"] for report in reports if report.get("url") == url]
    assert steps == sorted(steps) and steps[-1] == len(CONTENT)
    assert reports[-1] == {"result": "download_finished"}


@pytest.mark.parametrize("media_type", [OCI_MANIFEST, DOCKER_MANIFEST])
def test_projector_and_template_come_with_their_model(
    download: Run, registry: StandInRegistry, cache: Path, media_type: str
) -> None:
    layers = [Layer(EYES, MMPROJ), Layer(CONTENT), Layer(b"{{ messages }}", TEMPLATE)]
    registry.add(REPO, "eyes", layers, media_type)

    download(f"{REPO}:eyes")

    model = only(cache)
    assert model.mmproj is not None and model.mmproj.read_bytes() == EYES
    assert model.template is not None and model.template.read_bytes() == b"{{ messages }}"


def test_a_projector_may_be_left_out(download: Run, registry: StandInRegistry, cache: Path) -> None:
    registry.add(REPO, "eyes", [Layer(EYES, MMPROJ), Layer(CONTENT)])

    download(f"{REPO}:eyes", mmproj=False)

    assert only(cache).mmproj is None
    assert not registry.pulls(EYES)


def test_all_parts_of_a_split_model_arrive_in_order(download: Run, registry: StandInRegistry, cache: Path) -> None:
    parts = [b"GGUF part %d" % part for part in (1, 2, 3)]
    registry.add(REPO, "split", [Layer(part) for part in parts])

    download(f"{REPO}:split")

    path = only(cache).path
    assert path.name == "model-00001-of-00003.gguf"
    assert [part.read_bytes() for part in sorted(path.parent.iterdir())] == parts


@pytest.mark.parametrize(
    ("layers", "mmproj"),
    [
        ([Layer(CONTENT, "application/vnd.docker.ai.model.file.v1+gguf")], False),
        (
            [
                Layer(CONTENT, "application/vnd.ollama.image.model"),
                Layer(EYES, "application/vnd.ollama.image.projector"),
            ],
            True,
        ),
        ([Layer(CONTENT, MODELPACK, "m-Q4_K_M.gguf"), Layer(b"x", "text/x", "LICENSE")], False),
        ([Layer(CONTENT, "application/vnd.oci.image.layer.v1.tar", "m.gguf"), Layer(EYES, ANY, "mmproj.gguf")], True),
        ([Layer(b"GGUF 2", ANY, "m-Q2_K.gguf"), Layer(CONTENT, ANY, "m-Q8_0.gguf")], False),
    ],
)
def test_the_common_ways_to_pack_a_model_are_read(
    download: Run, registry: StandInRegistry, cache: Path, layers: list[Layer], mmproj: bool
) -> None:
    registry.add(REPO, "other", layers)

    assert download(f"{REPO}:other")["result"] == "download_finished"

    model = only(cache)
    assert model.path.read_bytes() == CONTENT
    assert (model.mmproj is not None) is mmproj


def test_no_tag_is_latest_and_a_digest_is_a_name(download: Run, registry: StandInRegistry, cache: Path) -> None:
    digest = registry.add(REPO, "latest", [Layer(CONTENT)])

    download(REPO)
    download(f"{REPO}@{digest}")

    assert listed(cache) == [f"{REPO}:latest", f"{REPO}@{digest}"]
    assert len(registry.pulls(CONTENT)) == 1


@pytest.mark.parametrize("media_type", [DOCKER_INDEX, "application/vnd.oci.image.index.v1+json"])
def test_an_index_leads_to_the_manifest_that_holds_a_model(
    download: Run, registry: StandInRegistry, cache: Path, media_type: str
) -> None:
    model = registry.add(REPO, "model", [Layer(CONTENT)])
    other = registry.add(REPO, "other", [Layer(b"x", "application/vnd.docker.ai.safetensors")])
    attestation = registry.add(REPO, "attestation", [Layer(b"GGUF no model")])
    entries = [
        registry.entry(REPO, attestation, annotations={"vnd.docker.reference.type": "attestation-manifest"}),
        registry.entry(REPO, other, platform={"os": "linux", "architecture": "amd64"}),
        registry.entry(REPO, model),
    ]
    inner = registry.add_index(REPO, "inner", entries, media_type)
    registry.add_index(REPO, "outer", [registry.entry(REPO, inner)], media_type)

    assert download(f"{REPO}:outer")["result"] == "download_finished"

    assert only(cache).path.read_bytes() == CONTENT


def test_what_is_there_is_not_fetched_again(download: Run, registry: StandInRegistry, cache: Path) -> None:
    registry.add(REPO, "same", [Layer(CONTENT), Layer(b"GGUF more", MMPROJ)])

    download()
    download()
    download(f"{REPO}:same")

    assert len(registry.pulls(CONTENT)) == 1
    assert listed(cache) == [f"{REPO}:{TAG}", f"{REPO}:same"]


def test_a_tag_that_has_moved_is_fetched_anew(download: Run, registry: StandInRegistry, cache: Path) -> None:
    download()
    registry.add(REPO, TAG, [Layer(b"GGUF newer")])

    download()

    assert only(cache).path.read_bytes() == b"GGUF newer"


def test_offline_nothing_is_asked(download: Run, registry: StandInRegistry) -> None:
    missing = download(offline=True)
    download()
    asked = len(registry.requests)

    assert (missing["code"], missing["retry"]) == ("offline", False)
    assert download(offline=True)["result"] == "download_finished"
    assert download(f"{REPO}:other", offline=True)["code"] == "offline"
    assert len(registry.requests) == asked


# --- tokens and redirects ---


def test_an_anonymous_token_is_asked_for_once(download: Run, registry: StandInRegistry, cache: Path) -> None:
    registry.needs_token = True

    assert download()["result"] == "download_finished"

    (asked,) = registry.asked("/token")
    assert asked.query == {"service": ["stand-in"], "scope": [f"repository:{REPO}:pull"]}
    assert asked.authorization == ""
    assert listed(cache) == [f"{REPO}:{TAG}"]


def test_a_token_that_grows_old_is_replaced(download: Run, registry: StandInRegistry, cache: Path) -> None:
    registry.needs_token = True
    registry.fault = RegistryFault(cut_after=50_000, cuts=1, expire_after=1)

    assert download()["result"] == "download_finished"

    assert len(registry.asked("/token")) == 2
    assert only(cache).path.read_bytes() == CONTENT


def test_a_redirect_to_another_host_is_followed_without_the_token(
    download: Run, registry: StandInRegistry, cache: Path
) -> None:
    registry.needs_token = registry.redirects = True
    registry.fault = RegistryFault(cut_after=50_000, cuts=1)

    assert download()["result"] == "download_finished"

    first, second = registry.asked("/storage/")
    assert (first.authorization, second.authorization) == ("", "")
    assert (first.range, second.range) == ("", "bytes=50000-")
    assert first.host.startswith("localhost:")
    assert all(request.authorization for request in registry.asked("/blobs/"))
    assert only(cache).path.read_bytes() == CONTENT


@pytest.mark.parametrize("location", ["ftp://localhost/x", "file:///etc/passwd", "http://[", "https://h:99999/"])
def test_a_redirect_that_leads_nowhere_is_refused(download: Run, registry: StandInRegistry, location: str) -> None:
    registry.fault = RegistryFault(location=location)

    end = download()

    assert (end["code"], "redirects to" in end["reason"]) == ("bad_answer", True)


def test_redirects_without_end_end(download: Run, registry: StandInRegistry, cache: Path) -> None:
    registry.fault = RegistryFault(location=f"{registry.url}/v2/{REPO}/blobs/{digest_of(CONTENT)}")

    assert download()["code"] == "bad_answer"

    assert len(registry.asked("/blobs/")) < 10
    registry.fault = RegistryFault()
    assert download()["result"] == "download_finished"


@pytest.mark.parametrize(
    "token", [b"", b"[]", b"{}", b'{"token": 1}', b'{"token": "a\\nb"}', b"[" * 60_000, b"{" + b" " * 70_000]
)
def test_a_token_that_is_none_is_refused(download: Run, registry: StandInRegistry, token: bytes) -> None:  # fmt: skip
    registry.needs_token = True
    registry.fault = RegistryFault(token=token or b" ")

    assert (download()["code"], len(registry.asked("/blobs/"))) == ("bad_answer", 0)


def test_a_login_that_is_wanted_is_named(download: Run, registry: StandInRegistry) -> None:
    registry.fault = RegistryFault(status=401, error_code="DENIED")

    end = download()

    assert (end["code"], end["retry"]) == ("no_repository", False)
    assert "not public (401 DENIED)" in end["reason"]


# --- a registry that does not ---


@pytest.mark.parametrize(
    ("fault", "code", "retry", "words"),
    [
        (RegistryFault(status=403, error_code="DENIED"), "refused", False, "refuses"),
        (RegistryFault(status=404), "no_repository", False, "there is no"),
        (RegistryFault(status=429, retry_after="17"), "rate_limited", True, "try again in 17 s"),
        (RegistryFault(status=429, retry_after="soon"), "rate_limited", True, "asked too often"),
        (RegistryFault(status=500), "hub_error", True, "answered 500"),
        (RegistryFault(status=418), "hub_error", False, "answered 418"),
        (RegistryFault(blob_status=403), "refused", False, "refuses"),
        (RegistryFault(blob_status=404, error_code="BLOB_UNKNOWN"), "no_repository", False, "404 BLOB_UNKNOWN"),
        (RegistryFault(blob_status=429, retry_after="3"), "rate_limited", True, "try again in 3 s"),
        (RegistryFault(blob_status=503), "hub_error", True, "answered 503"),
    ],
)
def test_a_no_is_explained_and_a_repeat_succeeds(
    download: Run, registry: StandInRegistry, cache: Path, fault: RegistryFault, code: str, retry: bool, words: str
) -> None:
    registry.fault = fault

    end = download()

    assert (end["result"], end["code"], end["retry"]) == ("download_failed", code, retry)
    assert words in end["reason"] and registry.host in end["reason"]
    assert end["retry_after"] == (float(fault.retry_after) if fault.retry_after.isdigit() else None)
    assert listed(cache) == []
    registry.fault = RegistryFault()
    assert download()["result"] == "download_finished"


def test_a_registry_that_is_not_there_is_unreachable(download: Run, registry: StandInRegistry, cache: Path) -> None:
    end = download("x:1")
    assert end["code"] == "no_repository"

    reports: list[dict[str, Any]] = []
    report: Callable[[Any], None] = reports.append
    command = Download(model="m", registry="r", repo="a/b", tag="1", cache=str(cache), endpoint="http://127.0.0.1:9")
    run_download(command, report, threading.Event())

    assert (reports[-1]["code"], reports[-1]["retry"]) == ("unreachable", True)
    assert reports[-1]["reason"].startswith("r cannot be reached: ")


def test_a_connection_that_is_cut_goes_on_where_it_was(download: Run, registry: StandInRegistry, cache: Path) -> None:
    registry.fault = RegistryFault(cut_after=50_000, cuts=3)

    assert download()["result"] == "download_finished"

    ranges = [request.range for request in registry.asked("/blobs/")]
    assert ranges == ["", "bytes=50000-", "bytes=100000-", "bytes=150000-"]
    assert only(cache).path.read_bytes() == CONTENT


def test_a_connection_that_is_always_cut_is_given_up_and_taken_up_again(
    download: Run, registry: StandInRegistry, cache: Path
) -> None:
    registry.fault = RegistryFault(cut_after=0)

    end = download()

    assert (end["code"], end["retry"], listed(cache)) == ("cut_off", True, [])
    registry.fault = RegistryFault(cut_after=70_000, cuts=1, blob_status=0)
    assert download()["result"] == "download_finished"


def test_a_registry_that_cannot_go_on_starts_anew(download: Run, registry: StandInRegistry, cache: Path) -> None:
    registry.fault = RegistryFault(cut_after=50_000, cuts=1, ignore_range=True)

    assert download()["result"] == "download_finished"

    assert only(cache).path.read_bytes() == CONTENT


def test_wrong_contents_are_thrown_away(download: Run, registry: StandInRegistry, cache: Path) -> None:
    registry.fault = RegistryFault(wrong_bytes=True)

    end = download()

    assert (end["code"], end["retry"], listed(cache)) == ("wrong_contents", True, [])
    assert [path.stat().st_size for path in unfinished(cache)] == [0]
    registry.fault = RegistryFault()
    assert download()["result"] == "download_finished"


def test_a_blob_that_is_too_short_or_too_long_never_counts_as_whole(
    download: Run, registry: StandInRegistry, cache: Path
) -> None:
    registry.add(REPO, "long", [Layer(CONTENT, size=100)])
    registry.fault = RegistryFault(short_by=10)

    assert download()["code"] == "cut_off"
    registry.fault = RegistryFault()
    assert download(f"{REPO}:long")["code"] == "wrong_contents"

    assert listed(cache) == []
    assert download()["result"] == "download_finished"


def test_what_does_not_fit_on_the_disk_is_not_begun(download: Run, registry: StandInRegistry, cache: Path) -> None:
    registry.add(REPO, "huge", [Layer(CONTENT, size=10**18)])

    end = download(f"{REPO}:huge")

    assert (end["code"], end["retry"]) == ("disk_full", True)
    assert "1000000000.00 GB are missing" in end["reason"]
    assert registry.asked("/blobs/") == []


def test_a_layer_that_is_no_gguf_file_is_thrown_away(download: Run, registry: StandInRegistry, cache: Path) -> None:
    registry.add(REPO, "elf", [Layer(b"\x7fELF" + CONTENT)])
    registry.add(REPO, "empty", [Layer(b"")])
    registry.add(REPO, "blind", [Layer(CONTENT), Layer(b"blind", MMPROJ)])

    for tag, words in [("elf", "starts with b'\\x7fELF'"), ("empty", "it is empty"), ("blind", "b'blin'")]:
        end = download(f"{REPO}:{tag}")
        assert (end["code"], end["retry"], words in end["reason"]) == ("not_gguf", False, True)

    assert listed(cache) == []
    assert not [path for path in cache.rglob("blobs/*") if path.stat().st_size < 100]


# --- manifests that are wrong ---


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ({"schemaVersion": 2, "layers": []}, "no_such_file", "holds no GGUF file; its layers are none"),
        ({"layers": [{"mediaType": "application/vnd.docker.ai.safetensors", "digest": digest_of(b""), "size": 1}]},
         "no_such_file", "its layers are 'application/vnd.docker.ai.safetensors'"),
        ({"schemaVersion": 1, "fsLayers": []}, "bad_answer", "first version"),
        ({"schemaVersion": 2}, "bad_answer", "either layers or manifests"),
        ({"layers": [], "manifests": []}, "bad_answer", "either layers or manifests"),
        ({"manifests": []}, "no_such_file", "an index without a model"),
        ({"layers": [{"mediaType": "x.gguf", "digest": "sha256:../../../../etc/passwd", "size": 4}]},
         "bad_answer", "no SHA-256 digest"),
        ({"layers": [{"mediaType": "x.gguf", "digest": "md5:" + "0" * 32, "size": 4}]}, "bad_answer", "no SHA-256"),
        ({"layers": [{"mediaType": "x.gguf", "digest": digest_of(b""), "size": -1}]}, "bad_answer", "makes no sense"),
        ({"layers": [{"mediaType": "x.gguf", "digest": digest_of(b""), "size": 1e300}]}, "bad_answer", "makes no"),
        ({"layers": [{"mediaType": "x.gguf", "digest": digest_of(b""), "size": "4"}]}, "bad_answer", "makes no sense"),
        ({"layers": [{"mediaType": "x.gguf", "size": 4}]}, "bad_answer", "makes no sense"),
        ({"layers": "x"}, "bad_answer", "makes no sense"),
        ({"layers": [{"mediaType": "x.gguf", "digest": digest_of(b""), "size": 4}] * 1001}, "bad_answer", "1001 parts"),
        ({"manifests": [{"digest": digest_of(b"%d" % n), "size": 4} for n in range(40)]}, "no_repository", "no "),
        ([], "bad_answer", "makes no sense"),
    ],
)  # fmt: skip
def test_a_manifest_that_makes_no_sense_is_refused(
    download: Run, registry: StandInRegistry, cache: Path, body: Any, code: str, words: str
) -> None:
    registry.put(REPO, "wrong", body)

    end = download(f"{REPO}:wrong")

    assert (end["code"], end["retry"], listed(cache)) == (code, False, [])
    assert words in end["reason"]


@pytest.mark.parametrize("raw", [b"{", b"\xff\xfe", b"[" * 100_000, b'{"x":' * 100_000, b'{"layers": null}', b"x"])
def test_a_manifest_that_is_no_json_is_refused(download: Run, registry: StandInRegistry, raw: bytes) -> None:
    registry.fault = RegistryFault(manifest=raw)

    assert download()["code"] == "bad_answer"


def test_a_manifest_without_end_is_not_read(download: Run, registry: StandInRegistry) -> None:
    registry.fault = RegistryFault(manifest=b" " * (MAX_MANIFEST + 1))

    assert f"over {MAX_MANIFEST} bytes" in download()["reason"]


def test_a_manifest_with_another_digest_is_refused(download: Run, registry: StandInRegistry, cache: Path) -> None:
    digest = registry.add(REPO, "latest", [Layer(CONTENT)])
    _, other = registry.manifests[REPO, TAG]
    registry.fault = RegistryFault(manifest=other)
    by_digest = download(f"{REPO}@{digest}")
    registry.fault = RegistryFault(said_digest=digest_of(b"other"))
    by_tag = download(REPO)

    for end in (by_digest, by_tag):
        assert (end["code"], end["retry"]) == ("wrong_contents", True)
    assert listed(cache) == []


def test_an_index_that_leads_to_itself_ends(download: Run, registry: StandInRegistry) -> None:
    entry = {"digest": digest_of(b"x"), "size": 1}
    digest = digest_of(json.dumps({"manifests": [entry]}).encode())
    body = json.dumps({"manifests": [{"digest": digest, "size": 1}]}).encode()
    registry.fault = RegistryFault(manifest=body)

    assert download()["code"] == "wrong_contents"  # nothing can hold its own digest

    tag = "x0"
    digest = registry.add(REPO, tag, [Layer(CONTENT)])
    for depth in range(1, 6):
        digest = registry.add_index(REPO, f"x{depth}", [registry.entry(REPO, digest)])
    registry.fault = RegistryFault()
    assert download(f"{REPO}:x5")["code"] == "no_such_file"
    assert download(f"{REPO}:x3")["result"] == "download_finished"


def test_an_index_is_searched_for_so_long_and_no_longer(download: Run, registry: StandInRegistry) -> None:
    others = [registry.add(REPO, f"o{n}", [Layer(b"%d" % n, "text/plain")]) for n in range(40)]
    registry.add_index(REPO, "many", [registry.entry(REPO, digest) for digest in others])

    assert download(f"{REPO}:many")["code"] == "bad_answer"

    assert len(registry.asked("/manifests/")) < 20


# --- in the middle ---


def test_nothing_is_written_through_a_link(
    download: Run, registry: StandInRegistry, cache: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (cache / "docker").mkdir(parents=True)
    (cache / "docker" / f"{registry.host}+ai+smollm2").symlink_to(outside)

    assert download()["code"] == "cache"

    assert list(outside.iterdir()) == []


def test_a_download_that_is_cancelled_goes_on_where_it_ended(
    download: Run, registry: StandInRegistry, cache: Path
) -> None:
    registry.fault = RegistryFault(hold=threading.Event())
    cancelled = threading.Event()
    ends: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: ends.append(download(cancelled=cancelled)))
    thread.start()
    while not unfinished(cache) or not unfinished(cache)[0].stat().st_size:
        assert thread.is_alive()
    cancelled.set()
    registry.fault.hold.set()  # type: ignore[union-attr]
    assert ended(thread, 20)

    assert (ends[0]["code"], listed(cache)) == ("cancelled", [])
    registry.fault = RegistryFault()
    assert download()["result"] == "download_finished"
    assert registry.pulls(CONTENT)[-1].range.startswith("bytes=")


def test_two_downloads_of_one_model_fetch_it_once(download: Run, registry: StandInRegistry, cache: Path) -> None:
    ends: list[dict[str, Any]] = []
    threads = [threading.Thread(target=lambda: ends.append(download())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        assert ended(thread, 30)

    assert [end["result"] for end in ends] == ["download_finished"] * 2
    assert len(registry.pulls(CONTENT)) == 1
    assert listed(cache) == [f"{REPO}:{TAG}"]
