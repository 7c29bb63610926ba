"""``GET /metrics``: all models in one scrape, in the words of Prometheus. Reading it wakes and changes nothing.

Where llama-server measures the same thing it has the same name here, with a label for the model; the rest begins with
``llamaherd_``.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from llamaherd.http.front import Front
from llamaherd.http.grants import CURRENT
from llamaherd.http.problems import NOT_OFFERED, PERMISSION, Problem
from llamaherd.http.tally import Histogram, Tally
from llamaherd.pool import EngineLoad, Event, ModelNotFound, ModelStatus, Pool, PoolCounts, State

__all__ = ["LoadWatch", "Metrics", "metrics"]

_CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_MODEL: Final = ("model",)
_REPLICA: Final = ("model", "replica")

#: Counters of one number per model: name, help, value.
_COUNTERS: Final[Mapping[str, tuple[str, Callable[[Tally], float]]]] = MappingProxyType(
    {
        "llamacpp:prompt_tokens": ("Prompt tokens computed.", lambda tally: tally.prompt_tokens),
        "llamacpp:prompt_seconds": ("Time spent on prompts.", lambda tally: tally.prompt_seconds),
        "llamacpp:tokens_predicted": ("Tokens generated.", lambda tally: tally.predicted_tokens),
        "llamacpp:tokens_predicted_seconds": ("Time spent generating.", lambda tally: tally.predicted_seconds),
        "llamacpp:prompt_tokens_cached": ("Prompt tokens found in the cache.", lambda tally: tally.cached_tokens),
        "llamaherd_loads": ("Times that the model was loaded.", lambda tally: tally.loads),
        "llamaherd_restarts": ("Loads after a worker that ended with an error.", lambda tally: tally.restarts),
        "llamaherd_load_failures": ("Times that the model could not be loaded.", lambda tally: tally.load_failures),
    }
)
_GAUGES: Final[Mapping[str, tuple[str, Callable[[ModelStatus], float]]]] = MappingProxyType(
    {
        "llamacpp:requests_processing": ("Requests in a worker.", lambda status: status.in_flight),
        "llamacpp:requests_deferred": ("Requests waiting for the model.", lambda status: status.queued),
        "llamaherd_memory_bytes": ("What the model takes, or is expected to.", lambda status: status.memory),
    }
)
#: What the workers tell of themselves, each replica its own; absent while it has not told.
_WORK_COUNTERS: Final[Mapping[str, tuple[str, Callable[[EngineLoad], float]]]] = MappingProxyType(
    {
        "llamacpp:n_decode": ("Calls of llama_decode since the load.", lambda load: load.decodes),
        "llamaherd_decoded_tokens": ("Tokens that these calls computed.", lambda load: load.decoded),
    }
)
_WORK_GAUGES: Final[Mapping[str, tuple[str, Callable[[EngineLoad], float]]]] = MappingProxyType(
    {
        "llamacpp:n_busy_slots_per_decode": (
            "Busy slots in the average call of llama_decode.",
            lambda load: load.slots_decoded / load.decodes if load.decodes else 0.0,
        ),
        "llamacpp:n_tokens_max": ("Most tokens that one request ever had.", lambda load: load.longest),
        "llamaherd_slots_busy": ("Slots with a running request.", lambda load: load.slots_busy),
        "llamaherd_kv_cells": ("Cells of the KV cache.", lambda load: load.cells),
        "llamaherd_kv_cells_used": ("Cells of the KV cache that are held.", lambda load: load.cells_used),
        "llamaherd_cached_sequences": ("Finished sequences in the KV cache.", lambda load: load.cached),
        "llamaherd_stored_bytes": ("States of sequences in RAM.", lambda load: load.stored_bytes),
    }
)
_HISTOGRAMS: Final[Mapping[str, tuple[str, Callable[[Tally], Histogram]]]] = MappingProxyType(
    {
        "llamaherd_time_to_first_token_seconds": (
            "From a request's acceptance to its first token, waiting and loading included.",
            lambda tally: tally.first_token,
        ),
        "llamaherd_queue_wait_seconds": (
            "From a request's acceptance until a worker took it, loading included.",
            lambda tally: tally.queue_wait,
        ),
        "llamaherd_inter_token_seconds": ("From one token to the next.", lambda tally: tally.token_gap),
    }
)


async def metrics(front: Front, request: Request) -> Response:
    """Answer with the figures of all models."""
    if not front.metrics:
        raise Problem(NOT_OFFERED, "This server does not support metrics endpoint. Start it with `--metrics`")
    if CURRENT.get().models is not None:
        raise Problem(PERMISSION, "this key does not open the figures of all models")
    return Response(Metrics(front.pool, front.tallies).render(), media_type=_CONTENT_TYPE)


class Metrics(Collector):
    """The figures as Prometheus takes them.

    Args:
        tallies: By model; models without any are shown with zeros.
    """

    def __init__(self, pool: Pool, tallies: Mapping[str, Tally]) -> None:
        self._pool = pool
        self._tallies = tallies

    def render(self) -> bytes:
        """Return the text of one scrape."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry)

    def collect(self) -> Iterable[Metric]:
        """Return the families of all metrics."""
        statuses = self._pool.models()
        counts = self._pool.counts()
        rows = [
            (status, (self._tallies.get(status.name) or Tally()).with_abandoned(counts.abandoned.get(status.name)))
            for status in statuses
        ]
        yield from _of_one_number(rows)
        yield from _of_work(statuses)
        yield from _of_replicas(statuses)
        yield from _of_more(rows)
        yield from _of_pool(counts, statuses)


def _of_one_number(rows: list[tuple[ModelStatus, Tally]]) -> Iterator[Metric]:
    for name, (text, value) in _COUNTERS.items():
        counter = CounterMetricFamily(name, text, labels=_MODEL)
        for status, tally in rows:
            counter.add_metric([status.name], value(tally))
        yield counter
    for name, (text, level) in _GAUGES.items():
        gauge = GaugeMetricFamily(name, text, labels=_MODEL)
        for status, _ in rows:
            gauge.add_metric([status.name], level(status))
        yield gauge
    for name, (text, values) in _HISTOGRAMS.items():
        histogram = HistogramMetricFamily(name, text, labels=_MODEL)
        for status, tally in rows:
            observed = values(tally)
            histogram.add_metric([status.name], observed.buckets(), sum_value=observed.sum)
        yield histogram


def _of_work(statuses: list[ModelStatus]) -> Iterator[Metric]:
    told = [
        ((status.name, str(replica.index)), replica.load)
        for status in statuses
        for replica in status.replicas
        if replica.load is not None
    ]
    for name, (text, value) in _WORK_COUNTERS.items():
        counter = CounterMetricFamily(name, text, labels=_REPLICA)
        for labels, load in told:
            counter.add_metric(labels, value(load))
        yield counter
    for name, (text, value) in _WORK_GAUGES.items():
        gauge = GaugeMetricFamily(name, text, labels=_REPLICA)
        for labels, load in told:
            gauge.add_metric(labels, value(load))
        yield gauge


def _of_replicas(statuses: list[ModelStatus]) -> Iterator[Metric]:
    running = GaugeMetricFamily("llamaherd_replica_requests", "Requests in each worker.", labels=_REPLICA)
    memory = GaugeMetricFamily("llamaherd_replica_memory_bytes", "What each worker takes.", labels=_REPLICA)
    for status in statuses:
        for replica in status.replicas:
            labels = (status.name, str(replica.index))
            running.add_metric(labels, replica.in_flight)
            memory.add_metric(labels, replica.memory)
    yield from (running, memory)


def _of_more(rows: list[tuple[ModelStatus, Tally]]) -> Iterator[Metric]:
    requests = CounterMetricFamily("llamaherd_requests", "Generations, by how they ended.", labels=("model", "outcome"))
    exits = CounterMetricFamily(
        "llamaherd_worker_exits", "Ends of workers, by exit code, negative for a signal.", labels=("model", "code")
    )
    states = GaugeMetricFamily(
        "llamaherd_model_state", "1 for the state that the model is in.", labels=("model", "state")
    )
    for status, tally in rows:
        for outcome in ("stop", "length", "cancelled", "failed"):
            requests.add_metric([status.name, outcome], tally.requests[outcome])
        for code, count in tally.exits.items():
            exits.add_metric([status.name, "unknown" if code is None else str(code)], count)
        for state in State:
            states.add_metric([status.name, state], float(status.state == state))
    yield from (requests, exits, states)


def _of_pool(counts: PoolCounts, statuses: list[ModelStatus]) -> Iterator[Metric]:
    evictions = CounterMetricFamily(
        "llamaherd_evictions", "Times that the model was stopped to make room for another.", labels=_MODEL
    )
    for status in statuses:
        evictions.add_metric([status.name], counts.evictions.get(status.name, 0))
    labels = ("transport", "direction")
    messages = CounterMetricFamily("llamaherd_transport_messages", "Messages of and to workers.", labels=labels)
    size = CounterMetricFamily("llamaherd_transport_bytes", "Bytes of these messages.", labels=labels)
    for direction, number, total in (
        ("received", counts.received, counts.received_bytes),
        ("sent", counts.sent, counts.sent_bytes),
    ):
        messages.add_metric([counts.transport, direction], number)
        size.add_metric([counts.transport, direction], total)
    yield from (evictions, messages, size)


class LoadWatch:
    """Counts loads and ends of workers from the pool's events."""

    def __init__(self, pool: Pool, tallies: Mapping[str, Tally]) -> None:
        self._pool = pool
        self._tallies = tallies
        self._states: dict[str, Any] = {}
        self._failed: set[str] = set()

    async def run(self) -> None:
        """Follow the events until the pool closes or this is cancelled."""
        async with self._pool.events() as events:
            async for event in events:
                self.note(event)

    def note(self, event: Event) -> None:
        """Count what one event tells."""
        if event.event == "snapshot":
            self._states = {model["name"]: model["state"] for model in event.data["models"]}
        status = event.data.get("status")
        if status is None:
            return
        before, self._states[event.model] = self._states.get(event.model), status
        tally = self._tallies[event.model]
        if status == State.LOADED and before == State.LOADING:
            tally.loads += 1
        if status == State.LOADING and before != State.LOADING and event.model in self._failed:
            self._failed.discard(event.model)
            tally.restarts += 1
        if "exit_code" in event.data:
            tally.exits[event.data["exit_code"]] += 1
            # A load that was called off ends in the same way, except that it is nobody's failure.
            if self._has_failed(event.model):
                self._failed.add(event.model)
                tally.load_failures += before == State.LOADING

    def _has_failed(self, model: str) -> bool:
        try:
            return self._pool.status(model).failed
        except ModelNotFound:
            return False  # a model that is no more on the list has left in order, or nobody cares
