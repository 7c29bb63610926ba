"""The figures: what is counted, when, and in which words."""

from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from live_front import LiveFront, fake, say
from llamaherd.http.tally import Histogram

CHAT = "/v1/chat/completions"


def scrape(client: httpx2.Client) -> dict[str, float]:
    """Return every sample, named as Prometheus writes it."""
    response = client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return {
        f"{sample.name}{{{','.join(f'{name}={value}' for name, value in sorted(sample.labels.items()))}}}": sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def scrape_until(client: httpx2.Client, condition: Callable[[dict[str, float]], bool]) -> dict[str, float]:
    """Scrape until something holds; the events of the pool are counted a moment after they happen."""
    while not condition(samples := scrape(client)):
        pass
    return samples


def test_a_scrape_shows_every_model_and_wakes_none() -> None:
    with LiveFront(fake("echo"), fake('"odd"\n\\name'.replace("\n", ""))) as front, front.client() as client:
        samples = scrape(client)
        assert samples["llamacpp:prompt_tokens_total{model=echo}"] == 0
        assert samples['llamacpp:requests_processing{model="odd"\\name}'] == 0
        assert samples["llamaherd_model_state{model=echo,state=unloaded}"] == 1
        assert front.ask(lambda pool: [status.pid for status in pool.models()]) == [None, None]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_counted(stream: bool) -> None:
    with LiveFront(fake("echo")) as front, front.client() as client:
        client.post(CHAT, json=say("one two three", model="echo", stream=stream))
        client.post(CHAT, json=say("one two three", model="echo", stream=stream, max_tokens=1))
        samples = scrape_until(client, lambda now: now["llamaherd_loads_total{model=echo}"] == 1)
    assert samples["llamaherd_requests_total{model=echo,outcome=stop}"] == 1
    assert samples["llamaherd_requests_total{model=echo,outcome=length}"] == 1
    assert samples["llamacpp:prompt_tokens_total{model=echo}"] == 6
    assert samples["llamacpp:tokens_predicted_total{model=echo}"] == 4
    assert samples["llamaherd_time_to_first_token_seconds_count{model=echo}"] == 2
    assert samples["llamaherd_inter_token_seconds_count{model=echo}"] == 2
    assert samples["llamaherd_inter_token_seconds_bucket{le=+Inf,model=echo}"] == 2
    assert samples["llamaherd_time_to_first_token_seconds_sum{model=echo}"] > 0
    assert samples["llamaherd_model_state{model=echo,state=loaded}"] == 1
    assert samples["llamacpp:requests_processing{model=echo}"] == 0


def test_the_native_api_is_counted_too() -> None:
    with LiveFront(fake("echo")) as front, front.client() as client:
        client.post("/completion", json={"model": "echo", "prompt": "one two"})
        assert scrape(client)["llamacpp:tokens_predicted_total{model=echo}"] == 2


def test_work_under_way_and_work_that_waits_are_told_apart(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    slow = fake("slow", step_gate=str(gate))
    with LiveFront(slow, fake("other"), models_max=1) as front, front.client() as client:
        with front.raw(CHAT, say("a", model="slow")), front.raw(CHAT, say("b", model="other")):
            front.wait_for_requests("other", 1)
            front.wait_until(lambda pool: pool.status("slow").in_flight == 1)
            samples = scrape(client)
            assert samples["llamacpp:requests_processing{model=slow}"] == 1
            assert samples["llamacpp:requests_deferred{model=slow}"] == 0
            assert samples["llamacpp:requests_deferred{model=other}"] == 1
        gate.touch()


def test_a_client_that_leaves_is_counted_with_the_tokens_made_for_it() -> None:
    endless = fake("endless", pieces=("x ",), repeat=100_000)
    with LiveFront(endless) as front, front.client() as client:
        with front.raw(CHAT, say("a", model="endless", stream=True)) as request:
            request.read_until(b'"content":"x "')
        # The worker's last word on it comes a moment later.
        samples = scrape_until(client, lambda now: now["llamacpp:prompt_tokens_total{model=endless}"] > 0)
    assert samples["llamaherd_requests_total{model=endless,outcome=cancelled}"] == 1
    assert samples["llamacpp:prompt_tokens_total{model=endless}"] == 1
    assert samples["llamacpp:tokens_predicted_total{model=endless}"] > 0


def test_a_request_that_fails_and_a_worker_that_is_killed_are_counted() -> None:
    with LiveFront(fake("dying", crash_at=1)) as front, front.client() as client:
        assert client.post(CHAT, json=say("a b", model="dying")).status_code == 500
        samples = scrape_until(client, lambda now: "llamaherd_worker_exits_total{code=-9,model=dying}" in now)
    assert samples["llamaherd_requests_total{model=dying,outcome=failed}"] == 1
    assert samples["llamaherd_loads_total{model=dying}"] == 1
    assert samples["llamaherd_load_failures_total{model=dying}"] == 0


def test_a_failed_load_is_counted() -> None:
    with LiveFront(fake("broken", load="fail")) as front, front.client() as client:
        assert client.post(CHAT, json=say("a", model="broken")).status_code == 500
        samples = scrape_until(client, lambda now: now["llamaherd_load_failures_total{model=broken}"] == 1)
    assert samples["llamaherd_worker_exits_total{code=3,model=broken}"] == 1
    assert samples["llamaherd_loads_total{model=broken}"] == 0


def test_a_load_that_is_called_off_is_no_failure(tmp_path: Path) -> None:
    with LiveFront(fake("slow", load_gate=str(tmp_path / "never"))) as front, front.client() as client:
        client.post("/models/load", json={"model": "slow"})
        front.wait_for_state("slow", "loading")
        client.post("/models/unload", json={"model": "slow"})
        samples = scrape_until(client, lambda now: "llamaherd_worker_exits_total{code=-9,model=slow}" in now)
    assert samples["llamaherd_load_failures_total{model=slow}"] == 0


def test_waits_swaps_and_restarts_are_counted() -> None:
    models = (fake("one"), fake("two"), fake("dying", crash_at=1))
    with LiveFront(*models, models_max=1) as front, front.client() as client:
        for model in ("one", "two", "one"):
            assert client.post(CHAT, json=say("a", model=model)).status_code == 200
        for _ in range(2):
            assert client.post(CHAT, json=say("a b", model="dying")).status_code == 500
        samples = scrape_until(client, lambda now: now["llamaherd_restarts_total{model=dying}"] == 1)
    assert samples["llamaherd_queue_wait_seconds_count{model=one}"] == 2
    assert samples["llamaherd_queue_wait_seconds_sum{model=one}"] > 0
    assert samples["llamaherd_evictions_total{model=one}"] == 2
    assert samples["llamaherd_evictions_total{model=two}"] == 1
    assert samples["llamaherd_restarts_total{model=one}"] == 0


def test_what_the_transport_carries_is_counted_also_of_workers_that_are_gone() -> None:
    with LiveFront(fake("echo")) as front, front.client() as client:
        client.post(CHAT, json=say("one two three", model="echo"))
        before = scrape(client)
        client.post("/models/unload", json={"model": "echo"})
        front.wait_for_state("echo", "unloaded")
        after = scrape(client)
    for name in ("messages", "bytes"):
        for direction in ("received", "sent"):
            sample = f"llamaherd_transport_{name}_total{{direction={direction},transport=pipe}}"
            assert 0 < before[sample] <= after[sample]
    # A load and a request, and the exit command after them.
    sent = "llamaherd_transport_messages_total{direction=sent,transport=pipe}"
    assert after[sent] > before[sent]


def test_metrics_can_be_switched_off() -> None:
    with LiveFront(fake("echo"), metrics=False) as front, front.client() as client:
        response = client.get("/metrics")
    assert response.status_code == 501
    assert response.json()["error"] == {
        "code": 501,
        "message": "This server does not support metrics endpoint. Start it with `--metrics`",
        "type": "not_supported_error",
    }


def test_a_histogram_counts_up_to_each_bound() -> None:
    histogram = Histogram((0.5, 1.0))
    for value in (0.1, 0.5, 0.6, 2.0):
        histogram.observe(value)
    histogram.observe(1.0, 3)
    assert histogram.buckets() == [("0.5", 2), ("1.0", 6), ("+Inf", 7)]
    assert histogram.sum == pytest.approx(6.2)
