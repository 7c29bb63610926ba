"""What a new catalogue means for the models that are there. Pure: the herd carries it out."""

from collections.abc import Iterable
from typing import TypeAlias

import msgspec

from llamaherd.pool.config import BrokenModel, ModelSpec, check_name
from llamaherd.pool.errors import BadRequest

__all__ = ["CatalogModel", "CatalogPlan", "ReloadReport", "plan_catalog"]

#: What a catalogue holds.
CatalogModel: TypeAlias = ModelSpec | BrokenModel


class ReloadReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a reload did, as names of models, and what was wrong with the catalogue.

    Attributes:
        added: New models.
        changed: Models whose spec is another one now. A worker that would be started otherwise now finishes what it has
            and leaves; the next request starts a new one.
        unchanged: Models that go on as they are.
        removed: Models that take no new requests; their workers finish what they have and leave.
        failed: Models that cannot be used, with the reason.
        problems: What was left out, for people: an alias or a whole entry whose name another one has.
    """

    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    failed: dict[str, str] = {}
    problems: tuple[str, ...] = ()


class CatalogPlan(msgspec.Struct, frozen=True):
    """A catalogue whose names are clear.

    Attributes:
        models: By name, in the catalogue's order.
        problems: As in :class:`ReloadReport`.
    """

    models: dict[str, CatalogModel]
    problems: tuple[str, ...]


def plan_catalog(models: Iterable[CatalogModel]) -> CatalogPlan:
    """Return which models a catalogue has, with every name used once.

    A spec that is wrong becomes a :class:`~llamaherd.pool.config.BrokenModel`. Names go before aliases, whatever their
    order; of two entries with one name the first counts, and an alias that is taken is left out, as in the reference.

    Raises:
        BadRequest: something is no model at all.
    """
    found: dict[str, CatalogModel] = {}
    problems: list[str] = []
    for model in models:
        if not isinstance(model, ModelSpec | BrokenModel):
            raise BadRequest(f"a catalogue holds ModelSpec and BrokenModel, not {type(model).__name__}")
        try:
            check_name(model.name)
        except BadRequest as error:
            problems.append(str(error))
            continue
        if model.name in found:
            problems.append(f"two models are called {model.name!r}; the second one is left out")
        else:
            found[model.name] = _checked(model)
    owners = {name: name for name in found}
    for name, model in found.items():
        found[name] = _with_free_aliases(model, owners, problems)
    return CatalogPlan(found, tuple(problems))


def _is_name(text: str) -> bool:
    try:
        check_name(text)
    except BadRequest:
        return False
    return True


def _checked(model: CatalogModel) -> CatalogModel:
    if isinstance(model, BrokenModel):
        return model
    try:
        model.check()
    except BadRequest as error:
        return BrokenModel(name=model.name, reason=str(error), tags=model.tags, path=model.path)
    return model


def _with_free_aliases(model: CatalogModel, owners: dict[str, str], problems: list[str]) -> CatalogModel:
    """Return the model with those of its aliases that nobody has, and take note of who has them now."""
    aliases: list[str] = []
    for alias in model.aliases:
        if not _is_name(alias):
            problems.append(f"an alias of model {model.name!r} is left out: {ascii(alias[:60])} cannot be a name")
        elif alias in owners:
            problems.append(f"alias {alias!r} of model {model.name!r} is left out: it belongs to {owners[alias]!r}")
        else:
            owners[alias] = model.name
            aliases.append(alias)
    kept = tuple(aliases)
    return model if kept == model.aliases else msgspec.structs.replace(model, aliases=kept)
