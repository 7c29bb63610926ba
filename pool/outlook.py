"""What the spare worker is to load ahead, and how it would be loaded now."""

from collections.abc import Mapping
from typing import Final, NamedTuple

import msgspec

from llamaherd.pool.clocks import now
from llamaherd.pool.entry import Entry
from llamaherd.pool.idle import rest_of
from llamaherd.pool.lifecycle import State
from llamaherd.pool.schedule import Scheduler
from llamaherd.transport.messages import Load

__all__ = ["Forecast", "Outlook", "load_of"]


class Forecast(NamedTuple):
    """What a spare is to load ahead, and for how many seconds it keeps that; None for as long as it lives."""

    load: Load
    seconds: float | None = None


class Outlook:
    """Asks the scheduler which model is likely wanted next, and says how that would be loaded.

    Args:
        entries: The registry's, to be read.
    """

    def __init__(self, scheduler: Scheduler, entries: Mapping[str, Entry]) -> None:
        self._scheduler: Final = scheduler
        self._entries: Final = entries

    def choose(self) -> Forecast | None:
        """Return what is to be loaded ahead, which takes its room from now on; None for nothing. An idle model would go
        after some time, and so does this.
        """
        name = self._scheduler.load_ahead(self._may_be_loaded)
        if name is None:
            return None
        entry = self._entries[name]
        rest = rest_of(entry.spec, State.LOADED, None)
        return Forecast(load_of(entry), None if rest is None else rest.seconds)

    def is_outdated(self, load: Load) -> bool:
        """Whether nobody would load a model like that any more. Its other names and its tags are not loaded, as for
        :meth:`~llamaherd.pool.config.ModelSpec.runs_as`.
        """
        entry = self._entries.get(load.model)
        if entry is None or entry.broken or entry.removed:
            return True
        return msgspec.structs.replace(load_of(entry), aliases=load.aliases, tags=load.tags) != load

    def _may_be_loaded(self, name: str) -> bool:
        entry = self._entries[name]
        usable = entry.sized and not (entry.broken or entry.removed or entry.preparing)
        return usable and entry.spec.missing() is None and entry.backoff.wait(now()) <= 0


def load_of(entry: Entry) -> Load:
    """Return the command that makes a worker load a model as it is to be run now."""
    return msgspec.structs.replace(entry.spec.to_load(entry.scales), cache_bytes=entry.cache_bytes)
