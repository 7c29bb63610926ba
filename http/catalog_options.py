"""The command line's options of where models come from."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from llamaherd.http.media_options import PROJECTOR_OPTIONS
from llamaherd.http.options import alias_option, model_option, models_dir_option
from llamaherd.http.presets import PresetOptions, explicit_settings
from llamaherd.pool import (
    DEMO,
    BadRequest,
    Catalog,
    EngineOptions,
    ModelSpec,
    Sources,
    build_catalog,
    cache_folder,
    gather,
)

__all__ = ["CatalogSettings", "catalog_options"]

_Command = Callable[..., Any]

_OPTIONS: Final[Sequence[Callable[[_Command], _Command]]] = (
    model_option,
    models_dir_option,
    click.option(
        "--models-preset",
        type=click.Path(path_type=Path),
        metavar="PATH",
        envvar="LLAMA_ARG_MODELS_PRESET",
        help="An INI file with a section per model, as llama-server reads it.",
    ),
    click.option(
        "--models-cache/--no-models-cache",
        default=True,
        show_default=True,
        help="Whether the models of the Hugging Face cache are offered, where no --model is given.",
    ),
    click.option(
        "--watch/--no-watch",
        default=False,
        show_default=True,
        help="Take up changes of the models folder, the preset file and the cache without being asked to.",
    ),
    alias_option,
    *PROJECTOR_OPTIONS,
)


@dataclass(frozen=True, kw_only=True)
class CatalogSettings:
    """What the options say.

    Attributes:
        explicit: What the command line says of the models themselves; it wins over presets.
    """

    models: Sequence[str]
    models_dir: Path | None
    models_preset: Path | None
    models_cache: bool
    watch: bool
    alias: str
    mmproj: Path | None
    mmproj_auto: bool
    explicit: Mapping[str, Any]

    @property
    def single(self) -> bool:
        """Whether nothing but files is asked for, or nothing at all."""
        return self.models_dir is None and self.models_preset is None

    def sources(
        self, options: EngineOptions, finish: Callable[[Sequence[ModelSpec]], tuple[ModelSpec, ...]]
    ) -> Sources:
        """Return where to look. ``finish`` completes the models that the command line itself names.

        Raises as :func:`~llamaherd.pool.build_catalog`, for the files; BadRequest for a projector of no or many models.
        """
        if self.mmproj is not None and len(self.models) != 1:
            raise BadRequest(f"a projector belongs to one model, and {len(self.models)} model files are given")
        aliases = [name.strip() for name in self.alias.split(",") if name.strip()]
        cache = cache_folder() if self.models_cache and not self.models else None
        given: tuple[ModelSpec, ...] = ()
        if self.models or (aliases and self.single):
            given = build_catalog(self.models, options=options, aliases=aliases).models
            if self.mmproj is not None:
                given = tuple(msgspec.structs.replace(spec, mmproj=self.mmproj.absolute()) for spec in given)
        elif self.single:
            given = build_catalog([DEMO], options=options).models
        return Sources(given=finish(given), models_dir=self.models_dir, cache=cache, presets=self.models_preset)

    def read(self, sources: Sources) -> Catalog:
        """Return the models of the sources; what was odd about presets is among the problems. Raises as
        :func:`~llamaherd.pool.gather`.
        """
        presets = PresetOptions(self.explicit)
        catalog = gather(sources, presets.configure)
        return Catalog(catalog.models, (*catalog.problems, *presets.warnings), catalog.broken)


def catalog_options(command: _Command) -> _Command:
    """Give a command these options; it receives them as one argument ``wanted``, a :class:`CatalogSettings`."""

    @functools.wraps(command)
    def with_settings(*args: Any, **values: Any) -> Any:
        names = [name for name in CatalogSettings.__annotations__ if name != "explicit"]
        own = {name: values.pop(name) for name in names}
        explicit = explicit_settings(click.get_current_context())
        return command(*args, wanted=CatalogSettings(**own, explicit=explicit), **values)

    decorated: _Command = with_settings
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated
