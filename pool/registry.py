"""The models that a pool has, by name: how they come, change and go. A part of the herd, and called by it alone."""

from collections.abc import Callable, Iterable
from typing import Final, TypedDict

from llamaherd.pool.config import BrokenModel, ModelSpec
from llamaherd.pool.entry import Entry, Replica
from llamaherd.pool.errors import BadRequest, PoolError
from llamaherd.pool.events import EventLog
from llamaherd.pool.explain import explain_broken, explain_removal
from llamaherd.pool.lifecycle import State
from llamaherd.pool.reload import CatalogModel, ReloadReport, plan_catalog
from llamaherd.pool.restart import Backoff
from llamaherd.pool.schedule import Scheduler

__all__ = ["Registry"]


class Registry:
    """Keeps the entries in step with the catalogue and with the scheduler.

    Args:
        turn_away: Called to end what waits for a model with an error.
        take_back: Called when a model has become another, before anything can start it as that.
        mind: Called after a change of what a replica may do while it is idle.

    Attributes:
        entries: By the models' names, in the catalogue's order; removed ones that still run come last.
        names: By every name and alias.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        events: EventLog,
        turn_away: Callable[[Entry, PoolError], None],
        take_back: Callable[[Entry], None],
        mind: Callable[[Replica], None],
    ) -> None:
        self._scheduler: Final = scheduler
        self._events: Final = events
        self._turn_away: Final = turn_away
        self._take_back: Final = take_back
        self._mind: Final = mind
        self.entries: Final[dict[str, Entry]] = {}
        self.names: Final[dict[str, Entry]] = {}

    def add(self, spec: ModelSpec) -> None:
        """A model exists from now on. Raises BadRequest if its spec is wrong or its name taken; nothing is added
        then.
        """
        spec.check()
        names = (spec.name, *spec.aliases)
        for name in names:
            if name in self.names:
                raise BadRequest(f"two models are called {name!r}: {self.names[name].name!r} and {spec.name!r}")
        if len(set(names)) < len(names):
            raise BadRequest(f"model {spec.name!r} has the same name twice")
        entry = self._insert(spec)
        self.names.update((name, entry) for name in names)

    def reload(self, models: Iterable[CatalogModel]) -> ReloadReport:
        """Take a new catalogue in the place of the old one. Raises BadRequest, and changes nothing, if it is none."""
        plan = plan_catalog(models)
        gone = [entry for entry in self.entries.values() if entry.name not in plan.models and not entry.removed]
        done: dict[str, list[str]] = {"added": [], "changed": [], "unchanged": []}
        for name, model in plan.models.items():
            done[self._take(model)].append(name)
        for entry in gone:
            self._remove(entry)
        self._sort(plan.models)
        self._events.emit("*", "models_reload", {})
        return ReloadReport(
            added=tuple(done["added"]),
            changed=tuple(done["changed"]),
            unchanged=tuple(done["unchanged"]),
            removed=tuple(entry.name for entry in gone),
            failed={model.name: model.reason for model in plan.models.values() if isinstance(model, BrokenModel)},
            problems=plan.problems,
        )

    def adopt(self, entry: Entry, spec: ModelSpec) -> None:
        """A model that has no worker awake has its files now, or has them no more."""
        catalogued = entry.catalogued or entry.spec
        self._change(entry, spec, "")
        entry.catalogued = catalogued

    def forget_if_gone(self, entry: Entry) -> None:
        """Forget a removed model whose last worker is gone."""
        if entry.removed and entry.worker is None:
            entry.stop_timers()
            del self.entries[entry.name]
            self._scheduler.remove(entry.name)
            self._events.emit(entry.name, "model_remove", {})

    def _take(self, model: CatalogModel) -> str:
        """Have a model as the catalogue says, and return what that was."""
        known = self.entries.get(model.name)
        spec, broken = _spec_of(model)
        if known is None:
            self._insert(spec, broken)
            return "added"
        # What was found for a model since counts as long as it is there.
        found = known.spec.path if spec == known.catalogued else None
        same = spec == known.spec or (found is not None and found.is_file())
        if same and (known.broken, known.removed) == (broken, False):
            return "unchanged"
        was_removed = known.removed
        self._change(known, spec, broken)
        return "added" if was_removed else "changed"

    def _sort(self, models: dict[str, CatalogModel]) -> None:
        listed = {name: self.entries[name] for name in models}
        rest = {name: entry for name, entry in self.entries.items() if name not in listed}
        self.entries.clear()
        self.entries.update(listed | rest)
        self.names.clear()
        for name, model in models.items():
            self.names.update((alias, listed[name]) for alias in (name, *model.aliases))

    def _insert(self, spec: ModelSpec, broken: str = "") -> Entry:
        entry = Entry(spec, broken=broken)
        entry.resize()
        self.entries[spec.name] = entry
        self._scheduler.add(spec.name, **_terms(spec))
        return entry

    def _change(self, entry: Entry, spec: ModelSpec, broken: str) -> None:
        """Run a model otherwise from now on. What runs stays if it would be started the same way again, and else
        finishes what it has.
        """
        if broken or entry.broken or not spec.runs_as(entry.spec) or spec.memory != entry.spec.memory:
            entry.sized, entry.estimated, entry.cache_bytes = False, False, 0
            entry.backoff = Backoff()
        if spec.options.adapters != entry.spec.options.adapters:
            entry.scales = None
        entry.spec, entry.catalogued, entry.broken, entry.removed = spec, None, broken, False
        entry.resize()
        if entry.info is not None:
            entry.info = {**entry.info, "aliases": list(spec.aliases), "tags": list(spec.tags)}
        if broken:
            self._turn_away(entry, explain_broken(entry))
        elif not entry.sized:
            self._take_back(entry)
        for replica in entry.replicas:
            if replica.state is State.UNLOADED:
                replica.error = replica.exit_code = None
            elif broken or not spec.runs_as(replica.spec, replica.index):
                self._scheduler.retire(entry.name, replica.index)
            else:
                self._scheduler.retain(entry.name, replica.index)
        self._scheduler.change(entry.name, **_terms(spec))
        for replica in entry.replicas:
            self._mind(replica)

    def _remove(self, entry: Entry) -> None:
        """A model takes no new requests; it is forgotten when its last worker has left."""
        entry.removed = True
        self._turn_away(entry, explain_removal(entry))
        for replica in entry.replicas:
            if replica.state is not State.UNLOADED:
                self._scheduler.retire(entry.name, replica.index)
        self.forget_if_gone(entry)


class _Terms(TypedDict):
    slots: int
    replicas: int
    pinned: bool
    queue_max: int | None
    placed: bool


def _terms(spec: ModelSpec) -> _Terms:
    """Return what the scheduler has to know of a model."""
    return {
        "slots": spec.options.n_parallel,
        "replicas": spec.replicas,
        "pinned": spec.pinned,
        "queue_max": spec.queue_max,
        "placed": spec.is_placed,
    }


def _spec_of(model: CatalogModel) -> tuple[ModelSpec, str]:
    """Return the spec that stands for a model of a catalogue, and why it cannot be used if it cannot."""
    if isinstance(model, ModelSpec):
        return model, ""
    return ModelSpec(name=model.name, aliases=model.aliases, tags=model.tags, path=model.path), model.reason
