"""What the engine's benchmark puts on a server: prompts, streams, and how long they took.

Prompts are token ids, drawn from a seeded generator, so that both sides compute exactly as many tokens.
"""

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from servers import Server

__all__ = ["Arrival", "arrival", "at_once", "completion", "prompt", "seconds_per_token", "tokens_per_second"]

#: Ids of ordinary tokens in the demo model's vocabulary.
_FIRST, _LAST = 1_000, 40_000
_DRAW: Final = random.Random(20_260)


def prompt(length: int) -> list[int]:
    """Return a prompt of so many tokens that was not used before."""
    return [_DRAW.randint(_FIRST, _LAST) for _ in range(length)]


def completion(tokens: Sequence[int], n_predict: int, **fields: Any) -> dict[str, Any]:
    """Return the body of a ``/completion`` that generates exactly ``n_predict`` tokens, greedily unless told
    otherwise.
    """
    return {
        "prompt": list(tokens),
        "n_predict": n_predict,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": False,
        **fields,
    }


def at_once(server: Server, bodies: Sequence[dict[str, Any]]) -> float:
    """Send all requests together; return the seconds until the last answer. Raises if one was cut short."""
    answers: list[Any] = [None] * len(bodies)

    def run(index: int) -> None:
        answers[index] = server.ask("/completion", bodies[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(bodies))]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    for body, answer in zip(bodies, answers, strict=True):
        if answer is None or answer["tokens_predicted"] != body["n_predict"]:
            raise RuntimeError(f"{server.name} did not answer in full: {answer}")
    return seconds


def tokens_per_second(server: Server, streams: int, n_prompt: int, n_predict: int) -> float:
    """Return the generated tokens per second of wall time, prompts included, all streams together."""
    bodies = [completion(prompt(n_prompt), n_predict) for _ in range(streams)]
    return streams * n_predict / at_once(server, bodies)


def seconds_per_token(server: Server, body: dict[str, Any]) -> float:
    """Return the time between tokens of one stream, from its first to its last."""
    times = [when for when, event in server.events("/completion", body) if event.get("tokens") or event.get("content")]
    return (times[-1] - times[0]) / (len(times) - 1)


@dataclass(frozen=True)
class Arrival:
    """A long prompt that arrived while others were generating, in seconds.

    Attributes:
        alone: Until the first token of such a prompt with nothing beside it.
        beside: Until the first token of the one that arrived.
        worst: The longest that a running stream waited for a token meanwhile.
    """

    alone: float
    beside: float
    worst: float


def arrival(server: Server, streams: int, n_prompt: int) -> Arrival:
    """Let a prompt arrive beside running streams, and let these end. Nothing else may run on the server."""
    alone = at_once(server, [completion(prompt(n_prompt), 1)])
    times: list[list[float]] = [[] for _ in range(streams)]
    flowing = threading.Semaphore(0)

    def stream(index: int) -> None:
        for when, _ in server.events("/completion", completion(prompt(16), 96)):
            times[index].append(when)
            if len(times[index]) == 4:
                flowing.release()

    threads = [threading.Thread(target=stream, args=(index,)) for index in range(streams)]
    for thread in threads:
        thread.start()
    for _ in threads:
        flowing.acquire()
    began = time.perf_counter()
    beside = at_once(server, [completion(prompt(n_prompt), 1)])
    ended = began + beside
    for thread in threads:
        thread.join()
    worst = max(
        later - earlier
        for one in times
        for earlier, later in zip(one, one[1:], strict=False)
        if later > began and earlier < ended
    )
    return Arrival(alone, beside, worst)
