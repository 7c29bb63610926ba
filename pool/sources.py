"""The catalogue: the models of all sources, under the reference's rules of precedence.

1. The caches, the models folder and the preset file are read, in this order; a model of a later source replaces one of
   an earlier that has the same name. A section of a preset file that is called like a model of another source sets
   that model up; any other section is a model itself, and names its file or its repository.
2. Settings: the command line's win over the section's, and those over ``[*]``.
3. A cached model whose file a preset with ``dedup-cache-models`` uses is not listed; its name is one of the preset's.

What a setting does is not known here but in a :data:`Configure`, which makes a model of settings. A model that cannot
be made costs itself and one line in :attr:`~llamaherd.pool.catalog.Catalog.problems`.
"""

import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec

from llamaherd.pool.caches import Caches
from llamaherd.pool.catalog import Catalog, is_name, scan_folder
from llamaherd.pool.config import BrokenModel, EngineOptions, ModelSpec
from llamaherd.pool.docker import docker_paths, read_template
from llamaherd.pool.errors import BadRequest, PoolError
from llamaherd.pool.hub import CachedModel, Seen
from llamaherd.pool.names import parse_name
from llamaherd.pool.origin import Found, Origin
from llamaherd.pool.presets import Preset, PresetFile, Setting, read_presets

__all__ = ["Configure", "Draft", "Sources", "fingerprint", "gather", "plain"]


#: Of models that came without a template.
_PLAIN: Final = EngineOptions()


class Draft(msgspec.Struct, frozen=True, kw_only=True):
    """A model as its settings say, before its files are looked for.

    Attributes:
        spec: Everything but the files.
        model: Path of its file; None if the settings name none.
        mmproj: Path of its projector, likewise.
        origin: Where its files are downloaded from if they are not there; None if the settings name no such place.
        dedup: Whether a cached model of the same file is to be hidden.
        no_mmproj: Whether a projector that is found beside the model is left alone.
    """

    spec: ModelSpec
    model: Path | None = None
    mmproj: Path | None = None
    origin: Origin | None = None
    dedup: bool = False
    no_mmproj: bool = False


#: Makes a model of its name and its settings, the general ones first. Raises BadRequest for a setting that is wrong,
#: with its place and the reason.
Configure = Callable[[str, Sequence[Setting]], Draft]


class Sources(msgspec.Struct, frozen=True, kw_only=True):
    """Where to look.

    Attributes:
        given: Models from the command line or from code. They come first, and settings of presets do not touch them.
        models_dir: A folder of models; None for none.
        cache: A Hugging Face cache; None for none.
        docker: A cache of llama.cpp, of which the models of registries are taken; None for none.
        presets: A preset file; None for none.
    """

    given: tuple[ModelSpec, ...] = ()
    models_dir: Path | None = None
    cache: Path | None = None
    docker: Path | None = None
    presets: Path | None = None


def plain(options: EngineOptions) -> Configure:
    """Return how models are made where nobody knows settings: all with these options. Raises BadRequest for one."""

    def configure(name: str, settings: Sequence[Setting]) -> Draft:
        if settings:
            raise BadRequest(f"{settings[0].place}: {settings[0].key}: settings are not understood here")
        return Draft(spec=ModelSpec(name=name, options=options))

    return configure


def gather(sources: Sources, configure: Configure) -> Catalog:
    """Return the models of all sources.

    Raises:
        BadRequest: the models folder or the preset file cannot be read, or ``[*]`` is no sound section.
    """
    file = read_presets(sources.presets) if sources.presets is not None else PresetFile()
    return _Gathering(sources, configure, file).run()


def fingerprint(sources: Sources) -> frozenset[tuple[str, int, int]]:
    """Return what changes when the sources do: paths with their times and sizes. Nothing is read."""
    seen: set[tuple[str, int, int]] = set()
    if sources.presets is not None:
        seen.update(_stamps(sources.presets))
    if sources.models_dir is not None:
        seen.update(_stamps(sources.models_dir, depth=2))
    if sources.cache is not None:
        for repo in _entries(sources.cache):
            if repo.name.startswith("models--"):
                seen.update(_stamps(repo / "refs", depth=1))
                seen.update(_stamps(repo / "snapshots", depth=3))
    if sources.docker is not None:
        for path in docker_paths(sources.docker):
            seen.update(_stamps(path, depth=2))
    return frozenset(seen)


def _stamps(path: Path, depth: int = 0) -> Iterator[tuple[str, int, int]]:
    try:
        status = path.stat()
    except OSError:
        return
    yield str(path), status.st_mtime_ns, status.st_size
    if depth and stat.S_ISDIR(status.st_mode):
        for entry in _entries(path):
            yield from _stamps(entry, depth - 1)


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


class _Gathering:
    """One run over all sources."""

    def __init__(self, sources: Sources, configure: Configure, file: PresetFile) -> None:
        self._sources = sources
        self._configure = configure
        self._file = file
        self._sections = {preset.name: preset for preset in file.presets}
        self._problems: list[str] = list(file.warnings)
        self._models: dict[str, ModelSpec] = {spec.name: spec for spec in sources.given}
        #: Aliases that were not asked for and give way to whatever has the name.
        self._offered: dict[str, str] = {}
        #: Files whose cached models are not listed, and the models that hide them.
        self._hidden: dict[Path, str] = {}
        self._broken: list[BrokenModel] = []
        #: Files of addresses, each with the model that it belongs to and its address, without what may be a secret.
        self._fetched: dict[Path, tuple[str, str]] = {}
        self._seen: Seen = {}

    def run(self) -> Catalog:
        found: dict[str, tuple[ModelSpec, CachedModel | None]] = {}
        for model in Caches(self._sources.cache, self._sources.docker).scan(self._seen):
            options = EngineOptions(chat_template=template) if (template := read_template(model.template)) else _PLAIN
            spec = ModelSpec(
                name=model.name,
                path=model.path,
                mmproj=model.mmproj,
                options=options,
                source="cache",
                repo=model.name,
            )
            found[model.name] = (spec, model)
        if self._sources.models_dir is not None:
            folder = scan_folder(self._sources.models_dir)
            self._problems.extend(folder.problems)
            found |= {spec.name: (msgspec.structs.replace(spec, source="models_dir"), None) for spec in folder.models}
        for preset in self._file.presets:
            self._take(preset.name, preset, found.pop(preset.name, (None, None))[0])
        for spec, cached in found.values():
            hider = self._hidden.get(spec.path) if cached is not None and spec.path is not None else None
            if hider is None:
                self._take(spec.name, None, spec)
            else:
                self._offered[spec.name] = hider
            if cached is not None and cached.is_default:
                self._offered[cached.repo] = hider or spec.name
        return Catalog(self._named(), tuple(dict.fromkeys(self._problems)), tuple(self._broken))

    def _take(self, name: str, preset: Preset | None, found: ModelSpec | None) -> None:
        try:
            if preset is not None and preset.error:
                raise BadRequest(preset.error)
            settings = (*self._file.everyone, *(preset.settings if preset is not None else ()))
            draft = self._configure(name, settings)
            spec = self._with_files(draft, found, preset)
            spec.check()
            other = self._models.get(name)
            if other is not None and other.path == spec.path:
                return  # one file by two ways
            if other is not None:
                raise BadRequest(f"{preset.place if preset else spec.path}: another model is called {name!r} already")
            if draft.dedup and spec.repo and spec.path is not None:
                self._hidden.setdefault(spec.path, name)
        except (PoolError, OSError) as error:  # a folder on the way to its files may be closed to us
            self._problems.append(f"model {name!r} cannot be used: {error}")
            if preset is not None and name not in self._models and is_name(name):
                self._broken.append(BrokenModel(name=name, reason=str(error)))
        else:
            self._models[name] = spec

    def _with_files(self, draft: Draft, found: ModelSpec | None, preset: Preset | None) -> ModelSpec:
        spec, origin = draft.spec, draft.origin
        path, mmproj, repo = draft.model, draft.mmproj, ""
        if origin is not None:
            origin, files = self._located(origin, draft)
            path, mmproj = (files.path, mmproj or files.mmproj) if files is not None else (None, mmproj)
            spec = spec if files is None else spec.with_template(files.template)
            repo = origin.repo
        elif path is None and found is not None:
            path, mmproj, repo = found.path, mmproj or found.mmproj, found.repo
            spec = spec.with_template(found.options.chat_template)
        elif path is None:
            place = f"{preset.place}: " if preset is not None else ""
            raise BadRequest(f"{place}it names no file and no repository: set model, hf-repo, docker-repo or model-url")
        source = "preset" if preset is not None or found is None else found.source
        if draft.no_mmproj:
            mmproj = draft.mmproj
        path = path.absolute() if path is not None else None
        return msgspec.structs.replace(spec, path=path, origin=origin, mmproj=mmproj, repo=repo, source=source)

    def _located(self, origin: Origin, draft: Draft) -> tuple[Origin, Found | None]:
        """Return an origin with its places filled in, and the files that are there of it."""
        if origin.url:
            origin = msgspec.structs.replace(origin, path=draft.model)
            mine = draft.spec.name, origin.address
            owner = self._fetched.setdefault(origin.target, mine)
            if owner[1] != mine[1]:
                raise BadRequest(
                    f"its file {origin.target} is that of model {owner[0]!r}, which comes from another address: "
                    "set model to where it shall lie"
                )
        else:
            wanted = draft.mmproj is None and not draft.no_mmproj
            folders = Caches(self._sources.cache, self._sources.docker)
            origin = msgspec.structs.replace(origin, cache=folders.folder(parse_name(origin.repo)), mmproj=wanted)
        origin.check()
        return origin, origin.find(self._seen)

    def _named(self) -> tuple[ModelSpec, ...]:
        """Return the models with the aliases that are free. Names win over aliases, earlier models over later ones."""
        taken = dict.fromkeys(self._models, "")
        models: list[ModelSpec] = []
        for spec in self._models.values():
            aliases: list[str] = []
            for alias in dict.fromkeys(spec.aliases):
                if alias == spec.name:
                    continue
                if alias in taken:
                    other = taken[alias] or alias
                    self._problems.append(f"model {spec.name!r} is not called {alias!r} too: {other!r} is")
                    continue
                taken[alias] = spec.name
                aliases.append(alias)
            kept = tuple(aliases)
            models.append(spec if kept == spec.aliases else msgspec.structs.replace(spec, aliases=kept))
        places = {spec.name: place for place, spec in enumerate(models)}
        for alias, name in self._offered.items():
            if alias not in taken and (place := places.get(name)) is not None:
                spec = models[place]
                models[place] = msgspec.structs.replace(spec, aliases=(*spec.aliases, alias))
        return tuple(models)
