"""LoRA adapters: small changes of a model's weights, switched on for whole batches.

llama.cpp applies adapters to a context and not to a sequence. So a batch holds sequences of one *set*, that is, of one
choice of adapters and scales, and what one set has computed is of no use to another. :class:`Turns` decides which set
is next.
"""

import struct
from collections.abc import Iterable, Sequence
from typing import Final, TypeAlias

from llamaherd.pool.child import llama_context, llama_log, llama_model
from llamaherd.pool.child.engine import EngineError, RequestError
from llamaherd.pool.child.model import Model, check_file
from llamaherd.pool.child.refusal import refusal
from llamaherd.transport.messages import Adapter

__all__ = ["MOST_ADAPTERS", "TURN_SECONDS", "AdapterSet", "Adapters", "Turns"]

#: The adapters that are on, ``(id, scale)`` by rising id, no scale 0. Empty: the model as it is.
AdapterSet: TypeAlias = tuple[tuple[int, float], ...]

MOST_ADAPTERS: Final = 256
#: How long the sequences of one set compute while those of another wait. A change of sets costs some milliseconds.
TURN_SECONDS: Final = 0.05
#: Larger factors make nothing but infinite numbers.
_MOST_SCALE: Final = 1000.0


class Adapters:
    """The adapters of one model, and the scales that requests get which name none. Free them before the model.

    Raises:
        EngineError: a file is missing, is no adapter or fits another model; nothing stays loaded then.
    """

    def __init__(self, model: Model, wanted: Sequence[Adapter]) -> None:
        self._handles: Final[list[int]] = []
        #: What the context applies at the moment.
        self._applied: AdapterSet = ()
        if len(wanted) > MOST_ADAPTERS:
            raise EngineError(
                f"{len(wanted)} LoRA adapters are given; at most {MOST_ADAPTERS} are taken", code="invalid_option"
            )
        try:
            for adapter in wanted:
                self._handles.append(_load(model, adapter.path))
            self._defaults: AdapterSet = ()
            self.set_defaults([adapter.scale for adapter in wanted])
        except BaseException:
            self.free()
            raise

    def __len__(self) -> int:
        return len(self._handles)

    def set_defaults(self, scales: Sequence[float]) -> None:
        """Use these scales, one for each adapter, from the next request on. Raises EngineError for others."""
        if len(scales) != len(self._handles):
            raise EngineError(
                f"{len(scales)} scales are given for {len(self._handles)} LoRA adapters", code="invalid_option"
            )
        for scale in scales:
            if not abs(scale) <= _MOST_SCALE:
                raise EngineError(f"the scale of a LoRA adapter is {scale}; {_RANGE}", code="invalid_option")
        self._defaults = _set_of(enumerate(scales))

    @property
    def defaults(self) -> AdapterSet:
        """The set of requests that name nothing."""
        return self._defaults

    def chosen(self, wish: Sequence[tuple[int, float]]) -> AdapterSet:
        """Return the set of a request: its wish, in which what is not named is off, or the defaults if it names
        nothing. Raises RequestError.
        """
        if not wish:
            return self._defaults
        for adapter, scale in wish:
            if not 0 <= adapter < len(self._handles):
                raise RequestError(
                    f"lora: there is no adapter {adapter}, the model has {len(self._handles)}", code="invalid_lora"
                )
            if not abs(scale) <= _MOST_SCALE:
                raise RequestError(f"lora: the scale of adapter {adapter} is {scale}; {_RANGE}", code="invalid_lora")
        return _set_of(dict(wish).items())

    def apply(self, context: int, adapters: AdapterSet) -> None:
        """Have a context's next batches computed with a set. Costs nothing if they are anyway; otherwise some
        milliseconds, as llama.cpp plans its computation anew. Raises EngineError if llama.cpp does not take it: what
        would be computed then has the weights of another set.
        """
        if adapters != self._applied:
            self.apply_beside(context, adapters)
            self._applied = adapters

    def apply_beside(self, context: int, adapters: AdapterSet) -> None:
        """As :meth:`apply`, for a context whose owner remembers by itself what it was given."""
        if not llama_context.set_adapters(context, [(self._handles[one], scale) for one, scale in adapters]):
            raise EngineError("llama.cpp did not take the LoRA adapters", code="adapter_failed", retry=True)

    def free(self) -> None:
        """Release the memory. Idempotent."""
        while self._handles:
            llama_model.adapter_free(self._handles.pop())


_RANGE: Final = f"it must be a number from {-_MOST_SCALE:g} to {_MOST_SCALE:g}"


def _load(model: Model, path: str) -> int:
    check_file(path)
    llama_log.forget_log()
    handle = llama_model.adapter_load(model.handle, path.encode("utf-8", "surrogateescape"))
    if handle is None:
        why = refusal("adapter_invalid")
        raise EngineError(f"LoRA adapter {path} cannot be loaded: {why.reason}", code=why.code)
    if llama_model.adapter_is_activated(handle):
        llama_model.adapter_free(handle)
        raise EngineError(
            f"{path} is an activated LoRA adapter (aLoRA), which this engine cannot serve: it would have to change "
            "within a prompt",
            code="adapter_unsupported",
        )
    return handle


def _set_of(scales: Iterable[tuple[int, float]]) -> AdapterSet:
    # As llama.cpp sees them, so that equal sets are equal here.
    narrow = ((adapter, struct.unpack("f", struct.pack("f", scale))[0]) for adapter, scale in scales)
    return tuple(sorted((adapter, scale) for adapter, scale in narrow if scale))


class Turns:
    """Which set computes the next step, where sequences of several sets run.

    They take turns, in the order in which they came. A turn is a time and not one step, because a change of sets costs
    about as much as a step of a small model; it ends early when nothing of its set is left. Pure: the caller brings the
    measurements.

    Args:
        seconds: Length of a turn; :data:`TURN_SECONDS` by default.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._seconds: Final = TURN_SECONDS if seconds is None else seconds
        #: Those that wait; the next one first.
        self._order: list[AdapterSet] = []
        self._current: AdapterSet = ()
        self._left = 0.0

    def choose(self, present: Iterable[AdapterSet]) -> AdapterSet:
        """Return the set whose turn it is, of those that have something to compute (at least one)."""
        waiting = dict.fromkeys(present)
        if self._current in waiting and (self._left > 0 or len(waiting) == 1):
            return self._current
        # Whoever waited before is ahead of newcomers, and the one that just had its turn comes last.
        order = dict.fromkeys([*(one for one in self._order if one in waiting), *waiting])
        order.pop(self._current, None)
        self._order = [*order, *([self._current] if self._current in waiting else [])]
        self._current, self._left = self._order.pop(0), self._seconds
        return self._current

    def note(self, seconds: float) -> None:
        """A step of the current set took so long."""
        self._left -= seconds
