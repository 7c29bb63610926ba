"""The command line's options of where models come from."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from llamaherd.http.docker_options import DOCKER_OPTION
from llamaherd.http.media_options import PROJECTOR_OPTIONS
from llamaherd.http.options import alias_option, model_option, models_dir_option
from llamaherd.http.presets import PresetOptions, explicit_settings
from llamaherd.http.wanted import Pull
from llamaherd.pool import (
    DEMO,
    BadRequest,
    Caches,
    Catalog,
    EngineOptions,
    ModelNotFound,
    ModelSpec,
    Origin,
    Sources,
    build_catalog,
    gather,
    parse_docker_name,
    parse_hub_name,
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
        help="Whether the models that were downloaded are offered, where no --model is given.",
    ),
    click.option(
        "--watch/--no-watch",
        default=False,
        show_default=True,
        help="Take up changes of the models folder, the preset file and the caches without being asked to.",
    ),
    click.option(
        "-hf",
        "-hfr",
        "--hf-repo",
        "hf_repo",
        default="",
        metavar="NAME",
        envvar="LLAMA_ARG_HF_REPO",
        help="A model of the Hugging Face hub to offer, <user>/<repo>[:<quant>], downloaded at the start if it is not "
        "in the cache.",
    ),
    click.option(
        "-hff",
        "--hf-file",
        "hf_file",
        default="",
        metavar="FILE",
        envvar="LLAMA_ARG_HF_FILE",
        help="The file of --hf-repo, instead of a quant.",
    ),
    DOCKER_OPTION,
    click.option(
        "-mu",
        "--model-url",
        "model_url",
        default="",
        metavar="URL",
        envvar="LLAMA_ARG_MODEL_URL",
        help="The address of a GGUF file to offer, downloaded at the start if it is not there: where --model says, or "
        "else in llama.cpp's cache.",
    ),
    click.option(
        "-hft",
        "--hf-token",
        "hf_token",
        default="",
        metavar="TOKEN",
        help="A token for the hub. Others on this machine can see command lines: better use HF_TOKEN.",
    ),
    click.option(
        "--offline",
        is_flag=True,
        envvar="LLAMA_ARG_OFFLINE",
        help="Download nothing: what is not there is an error.",
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
    hf_repo: str
    hf_file: str
    hf_token: str
    docker_repo: str
    model_url: str
    offline: bool
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
        origin = self._address()  # it stays the model's: a file that is deleted is downloaded again
        models = [str(origin.target if (found := origin.find()) is None else found.path)] if origin else self.models
        repository = self._repository()
        if self.mmproj is not None and len(models) != 1 and repository is None:
            raise BadRequest(f"a projector belongs to one model, and {len(models)} model files are given")
        aliases = [name.strip() for name in self.alias.split(",") if name.strip()]
        caches = Caches.of_environment() if self.models_cache and not (models or repository) else Caches()
        given: tuple[ModelSpec, ...] = ()
        if repository is not None:
            given = (self._repository_model(repository, options, aliases),)
        elif models or (aliases and self.single):
            given = build_catalog(models, options=options, aliases=aliases).models
            if self.mmproj is not None:
                given = tuple(msgspec.structs.replace(spec, mmproj=self.mmproj.absolute()) for spec in given)
            if origin is not None:
                given = tuple(msgspec.structs.replace(spec, origin=origin) for spec in given)
        elif self.single:
            given = build_catalog([DEMO], options=options).models
        return Sources(
            given=finish(given),
            models_dir=self.models_dir,
            cache=caches.hub,
            docker=caches.docker,
            presets=self.models_preset,
        )

    def _address(self) -> Origin | None:
        if self.hf_repo and self.docker_repo:
            raise BadRequest("--hf-repo and --docker-repo cannot be given together")
        if (self.hf_repo or self.docker_repo) and (self.models or self.model_url):
            flag = "--hf-repo" if self.hf_repo else "--docker-repo"
            raise BadRequest(f"{flag} cannot be given together with --model or --model-url")
        if not self.model_url:
            return None
        if len(self.models) > 1:
            raise BadRequest("--model-url is downloaded to one --model at most")
        path = Path(self.models[0]) if self.models else None
        origin = Origin(url=self.model_url, path=path, offline=self.offline)
        origin.check()
        return origin

    def _repository(self) -> Origin | None:
        if not (self.hf_repo or self.docker_repo):
            return None
        name = parse_hub_name(self.hf_repo) if self.hf_repo else parse_docker_name(self.docker_repo)
        origin = Origin(repo=str(name), file=self.hf_file, mmproj=self.mmproj is None and self.mmproj_auto)
        origin.check()
        return origin

    def _repository_model(self, origin: Origin, options: EngineOptions, aliases: Sequence[str]) -> ModelSpec:
        found = origin.find()
        # llama-server calls a model of Docker as the command line does.
        names = list(aliases) or [origin.repo, *([self.docker_repo] if self.docker_repo else [])]
        spec = ModelSpec(
            name=names[0],
            aliases=tuple(name for name in dict.fromkeys(names[1:]) if name != names[0]),
            path=None if found is None else found.path,
            mmproj=self.mmproj.absolute() if self.mmproj is not None else None if found is None else found.mmproj,
            options=options,
            repo=origin.repo,
            origin=msgspec.structs.replace(origin, token=self.hf_token or "", offline=self.offline),
        )
        return spec if found is None else spec.with_template(found.template)

    def missing(self) -> Pull | None:
        """Return what has to be downloaded before the models can be served, None if nothing has.

        Raises:
            BadRequest: ``--hf-repo`` or ``--docker-repo`` is no name, or ``--model-url`` no address.
            ModelNotFound: it is not there, and this is offline.
        """
        address = self._address()
        if address is not None and address.find() is None:
            if self.offline:
                raise ModelNotFound(f"{address.target} is not there, and this is offline")
            return Pull(url=address.url, path=address.path)
        origin = self._repository()
        if origin is None or origin.find() is not None:
            return None
        if self.offline:
            raise ModelNotFound(f"{origin.repo} is not in the cache, and this is offline")
        return Pull(model=origin.repo, file=origin.file, token=self.hf_token)

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
