"""``/slots`` and what belongs to it, over real sockets, in llama-server's shapes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import httpx2
import pytest
from click.testing import CliRunner

from live_front import LiveFront
from llamaherd.http.context_options import context_fields
from llamaherd.http.options import engine_options
from llamaherd.http.sse import DONE
from llamaherd.pool import EngineOptions, ModelSpec, State
from tiny_gguf import tiny_model

PROMPT: dict[str, Any] = {"prompt": "hello there, " * 12, "temperature": 0, "max_tokens": 8, "ignore_eos": True}


def spec(folder: str = "", **options: Any) -> ModelSpec:
    given: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "n_parallel": 2, "flash_attn": "off", **options}
    return ModelSpec(name="tiny", path=tiny_model("random"), options=EngineOptions(slot_save_path=folder, **given))


@pytest.fixture
def front(tmp_path: Path) -> Iterator[LiveFront]:
    with LiveFront(spec(str(tmp_path)), default_model="tiny") as live:
        yield live


@pytest.fixture
def client(front: LiveFront) -> Iterator[httpx2.Client]:
    with front.client() as http:
        yield http


def complete(client: httpx2.Client, **more: Any) -> dict[str, Any]:
    response = client.post("/completion", json={**PROMPT, **more})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_slots_are_listed_as_llama_server_lists_them(front: LiveFront, client: httpx2.Client) -> None:
    assert client.get("/slots").status_code == 400, "a model that is not loaded has none, and is not loaded for that"
    assert front.ask(lambda pool: pool.status("tiny").state) is State.UNLOADED
    answer = complete(client, id_slot=1, n_keep=3)
    idle, used = client.get("/slots", params={"model": "tiny"}).json()
    assert answer["id_slot"] == 1
    assert idle == {"id": 0, "n_ctx": 512, "speculative": False, "is_processing": False, "n_prompt_tokens": 0}
    assert set(used) == {*idle, "id_task", "n_prompt_tokens_processed", "n_prompt_tokens_cache", "params", "next_token"}
    assert used["n_prompt_tokens"] == answer["tokens_evaluated"] + 7
    assert used["params"]["n_predict"] == 8 and used["params"]["n_keep"] == 3 and used["params"]["temperature"] == 0
    (next_token,) = used["next_token"]
    assert (next_token["n_decoded"], next_token["n_remain"], next_token["has_next_token"]) == (8, 0, False)
    assert "hello" not in str(used)


def test_a_slot_is_saved_erased_and_restored(client: httpx2.Client, tmp_path: Path) -> None:
    answer = complete(client)
    slot = answer["id_slot"]
    saved = client.post(f"/slots/{slot}", params={"action": "save"}, json={"filename": "a.bin"}).json()
    assert (saved["id_slot"], saved["filename"]) == (slot, "a.bin")
    assert saved["n_saved"] == answer["tokens_evaluated"] + 7
    assert saved["n_written"] == (tmp_path / "a.bin").stat().st_size
    assert saved["timings"]["save_ms"] > 0
    assert client.post(f"/slots/{slot}", params={"action": "erase"}).json() == {
        "id_slot": slot,
        "n_erased": saved["n_saved"],
    }
    restored = client.post("/slots/0", params={"action": "restore"}, json={"filename": "a.bin"}).json()
    assert (restored["n_restored"], restored["n_read"]) == (saved["n_saved"], saved["n_written"])
    again = complete(client)
    assert again["content"] == answer["content"]
    assert again["tokens_cached"] == answer["tokens_evaluated"] - 1


@pytest.mark.parametrize(
    ("path", "action", "body"),
    [
        ("/slots/9", "erase", {}),
        ("/slots/x", "erase", {}),
        ("/slots/-1", "erase", {}),
        ("/slots/99999999999999999999", "erase", {}),
        ("/slots/0", "", {"filename": "a"}),
        ("/slots/0", "dance", {"filename": "a"}),
        ("/slots/0", "save", {}),
        ("/slots/0", "save", {"filename": 3}),
        ("/slots/0", "save", {"filename": "a"}),
        ("/slots/0", "restore", {"filename": "gone"}),
        ("/slots/0", "restore", {"filename": "../a"}),
        ("/slots/0", "restore", {"filename": "a/b"}),
        ("/slots/0", "restore", {"filename": "a\0"}),
        ("/slots/0", "restore", {"filename": ""}),
        ("/slots/0", "restore", {"filename": "a" * 300}),
    ],
)
def test_bad_actions_are_400_and_harm_nobody(client: httpx2.Client, path: str, action: str, body: Any) -> None:
    complete(client, id_slot=1)
    response = client.post(path, params={"action": action}, json=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["message"]
    assert complete(client)["tokens_predicted"] == 8


def test_without_a_folder_and_without_the_view_both_are_not_offered() -> None:
    with LiveFront(spec(), default_model="tiny", slots=False) as live, live.client() as client:
        complete(client)
        for response in (client.get("/slots"), client.post("/slots/0", params={"action": "erase"})):
            assert response.status_code == 501
            assert response.json()["error"]["type"] == "not_supported_error"


def test_no_free_slot_is_503_for_those_who_ask(client: httpx2.Client) -> None:
    complete(client)
    assert client.get("/slots", params={"fail_on_no_slot": "1"}).status_code == 200


@pytest.mark.parametrize("path", ["/completion", "/v1/completions", "/v1/chat/completions"])
def test_streams_tell_how_far_the_prompt_is(path: str) -> None:
    with LiveFront(spec(n_batch=32, n_ubatch=32), default_model="tiny") as live, live.client() as client:
        body = {**PROMPT, "stream": True, "return_progress": True}
        if "chat" in path:
            body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
            body["chat_template_kwargs"] = {}
        text = client.post(path, json=body).text
        chunks = [
            httpx2.Response(200, text=line[6:]).json() for line in text.split("\n\n") if line.startswith("data: {")
        ]
    assert (DONE.decode() in text) == (path != "/completion")
    told = [chunk["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk]
    assert told and set(told[0]) == {"total", "cache", "processed", "time_ms"}
    assert [one["processed"] for one in told] == sorted({one["processed"] for one in told})
    assert told[-1]["processed"] == told[-1]["total"]
    assert "prompt_progress" in chunks[0 if path != "/v1/chat/completions" else 1]


def test_metrics_tell_of_the_workers_own_figures(client: httpx2.Client) -> None:
    complete(client)
    wanted = (
        'llamacpp:n_decode_total{model="tiny",replica="0"}',
        'llamaherd_kv_cells{model="tiny",replica="0"} 512.0',
        'llamacpp:n_busy_slots_per_decode{model="tiny",replica="0"}',
        'llamacpp:n_tokens_max{model="tiny",replica="0"}',
    )
    text = ""
    while not all(one in text for one in wanted):  # within a second, or the test's own limit
        text = client.get("/metrics").text


def test_options_of_the_context_reach_the_engine(tmp_path: Path) -> None:
    seen: list[EngineOptions] = []

    @click.command()
    @engine_options
    def command(options: EngineOptions) -> None:
        seen.append(options)

    words = "-ctk q8_0 -ctv q4_0 -cram 7 --n-cached 3 --no-swa-full --context-shift --keep -1 --rope-scale 4"
    more = ["--rope-scaling", "yarn", "--slot-save-path", str(tmp_path)]
    result = CliRunner().invoke(command, [*words.split(), *more])
    assert result.exit_code == 0, result.output
    (options,) = seen
    assert (options.cache_type_k, options.cache_type_v, options.cache_ram, options.n_cached) == ("q8_0", "q4_0", 7, 3)
    assert (options.swa_full, options.context_shift, options.n_keep, options.rope_scaling) == (False, True, -1, "yarn")
    assert (options.rope_freq_scale, options.slot_save_path) == (0.25, str(tmp_path))
    assert CliRunner().invoke(command, ["--slot-save-path", str(tmp_path / "gone")]).exit_code == 2
    with pytest.raises(click.UsageError, match="same thing"):
        context_fields({"rope_scale": 2.0, "rope_freq_scale": 0.5})
