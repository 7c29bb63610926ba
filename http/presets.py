"""What the settings of a preset file do: they are read by the command line's own options, so that a key means what the
flag means, and a new option of the engine is a key at once.

Beside the engine's options a preset has those of one model: which file, how it is called, and how the pool treats it.
llama-server knows ``load-on-startup``, ``stop-timeout`` and ``dedup-cache-models`` of these; ``pinned``, ``priority``,
``replicas``, ``gpus``, ``cores``, ``memory``, the idle times and the limits to waiting are ours.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import click
import msgspec

from llamaherd.http.docker_options import DOCKER_OPTION
from llamaherd.http.media_options import PROJECTOR_OPTIONS
from llamaherd.http.options import Whole, engine_options
from llamaherd.http.placement_options import CoreLists, GpuLists, placements_of
from llamaherd.http.sampling_options import SAMPLING_OPTIONS, is_sampling, sampling_defaults
from llamaherd.pool import (
    BadRequest,
    Draft,
    EngineOptions,
    ModelSpec,
    Origin,
    Setting,
    check_defaults,
    find_key,
    parse_docker_name,
    shown_address,
)

__all__ = ["PresetOptions", "explicit_settings"]

_MIB: Final = 1024 * 1024
_YEAR: Final = 86400.0 * 365
_TRUE: Final = ("on", "enabled", "true", "1")
_FALSE: Final = ("off", "disabled", "false", "0")


class _Truth(click.ParamType[bool]):
    """The words that llama-server takes for yes and no."""

    name = "bool"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bool:
        if isinstance(value, bool):
            return value
        if value in _TRUE or value in _FALSE:
            return value in _TRUE
        return self.fail(f"{value!r} is not one of {', '.join((*_TRUE, *_FALSE))}.", param, ctx)


_SECONDS: Final = click.FloatRange(-1, _YEAR)
_MODEL: Final[Sequence[Callable[[Any], Any]]] = (
    click.option("-m", "--model", type=click.Path(path_type=Path), envvar="LLAMA_ARG_MODEL"),
    click.option("-hf", "-hfr", "--hf-repo", default="", envvar="LLAMA_ARG_HF_REPO"),
    click.option("-hff", "--hf-file", default="", envvar="LLAMA_ARG_HF_FILE"),
    DOCKER_OPTION,
    click.option("-mu", "--model-url", default="", envvar="LLAMA_ARG_MODEL_URL"),
    click.option("-hft", "--hf-token", default=""),
    click.option("--offline", type=_Truth(), default=False, envvar="LLAMA_ARG_OFFLINE"),
    *PROJECTOR_OPTIONS,
    click.option("-a", "--alias", default="", envvar="LLAMA_ARG_ALIAS"),
    click.option("--tags", default="", envvar="LLAMA_ARG_TAGS"),
    click.option("--load-on-startup", type=_Truth(), default=False),
    click.option("--dedup-cache-models", type=_Truth(), default=False),
    click.option("--stop-timeout", type=click.FloatRange(0, 86400), default=None),
    click.option("--sleep-idle-seconds", type=_SECONDS, default=-1.0),
    click.option("--unload-idle-seconds", type=_SECONDS, default=-1.0),
    click.option(
        "--load-stall-seconds", type=click.FloatRange(0, 86400), default=ModelSpec(name="m").load_stall_seconds
    ),
    click.option("--pinned", type=_Truth(), default=False),
    click.option("--priority", type=Whole(-(2**31)), default=0),
    click.option("--memory", type=Whole(0), default=None),
    click.option("--replicas", type=Whole(1), default=1),
    click.option("--gpus", type=GpuLists(), default=()),
    click.option("--cores", type=CoreLists(), default=()),
    click.option("--queue-max-per-model", type=Whole(0), default=None),
    click.option("--queue-timeout", type=click.FloatRange(0, 86400), default=None),
    *SAMPLING_OPTIONS,
)
#: Which model it is and how it is called, with their defaults: never taken from the command line or the environment.
_OWN: Final[Mapping[str, Any]] = {
    "model": None,
    "hf_repo": "",
    "hf_file": "",
    "docker_repo": "",
    "model_url": "",
    "alias": "",
    "mmproj": None,
}
#: Keys that listings leave out: what is told elsewhere, and secrets.
_UNTOLD: Final = frozenset(
    ["a", "alias", "LLAMA_ARG_ALIAS", "tags", "LLAMA_ARG_TAGS", "host", "LLAMA_ARG_HOST", "port", "LLAMA_ARG_PORT"]
    + ["hft", "hf-token", "HF_TOKEN", "api-key", "LLAMA_API_KEY", "api-key-file", "LLAMA_ARG_API_KEY_FILE"]
)
#: Keys whose addresses may have secrets in them.
_ADDRESSES: Final = frozenset(["mu", "model-url", "LLAMA_ARG_MODEL_URL", "mmu", "mmproj-url", "LLAMA_ARG_MMPROJ_URL"])
#: Options for one thing: the one that is set last takes the place of the others.
_ONE_THING: Final = (
    ("template_source", "template_file"),
    ("default_samplers", "sampler_letters"),
    ("default_grammar", "default_grammar_file", "default_json_schema", "default_json_schema_file"),
)
_EXCLUSIVE: Final = {option: options for options in _ONE_THING for option in options}
#: Keys of earlier llama-servers, which ``load-mode`` has replaced there; ``mmap`` still counts here.
_FORMER: Final = frozenset(
    ["mlock", "LLAMA_ARG_MLOCK", "direct-io", "no-direct-io", "dio", "ndio", "LLAMA_ARG_DIO", "LLAMA_ARG_NO_DIO"]
)
#: Names of llama-server's own templates, without ``chatml``, which is known here too.
_TEMPLATES: Final = frozenset(
    [
        "bailing",
        "bailing-think",
        "bailing2",
        "chatglm3",
        "chatglm4",
        "command-r",
        "deepseek",
        "deepseek-ocr",
        "deepseek2",
        "deepseek3",
        "exaone-moe",
        "exaone3",
        "exaone4",
        "falcon3",
        "gemma",
        "gigachat",
        "glmedge",
        "gpt-oss",
        "granite",
        "granite-4.0",
        "granite-4.1",
        "grok-2",
        "hunyuan-dense",
        "hunyuan-moe",
        "hunyuan-vl",
        "kimi-k2",
        "llama2",
        "llama2-sys",
        "llama2-sys-bos",
        "llama2-sys-strip",
        "llama3",
        "llama4",
        "megrez",
        "minicpm",
        "mistral-v1",
        "mistral-v3",
        "mistral-v3-tekken",
        "mistral-v7",
        "mistral-v7-tekken",
        "monarch",
        "openchat",
        "orion",
        "pangu-embedded",
        "phi3",
        "phi4",
        "rwkv-world",
        "seed_oss",
        "smolvlm",
        "solar-open",
        "vicuna",
        "vicuna-orca",
        "yandex",
        "zephyr",
    ]
)


class _Key(NamedTuple):
    """What a preset's key stands for."""

    option: click.Option
    negated: bool


@click.command(add_help_option=False)
@engine_options
def _engine(options: EngineOptions) -> EngineOptions:
    return options


@click.command(add_help_option=False)
def _model() -> None:
    pass


for _option in reversed(_MODEL):
    _model = cast(click.Command, _option(_model))


class PresetOptions:
    """Makes models of settings. Its :meth:`configure` is a :data:`~llamaherd.pool.Configure`.

    Args:
        explicit: What the command line itself says, by the options' names, converted. It wins over every setting.

    Attributes:
        warnings: One line for people per flag that is known to llama-server and without effect here, or so.
    """

    def __init__(self, explicit: Mapping[str, Any] | None = None) -> None:
        self._explicit = {name: value for name, value in (explicit or {}).items() if name not in _OWN}
        self._context = click.Context(_engine)
        params = [param for command in (_engine, _model) for param in command.params if isinstance(param, click.Option)]
        self._keys = _keys_of(params)
        self._defaults: dict[str, Any] = {}
        for command in (_engine, _model):
            with command.make_context("preset", [], resilient_parsing=False) as context:
                self._defaults |= context.params
        self._defaults |= _OWN
        #: What the environment says of requests; there is no other default of them.
        self._sampling = {name: value for name, value in self._defaults.items() if is_sampling(name)}
        #: Names without effect, each with the places that it stands at.
        self._idle: dict[str, dict[str, None]] = {}
        self._engines: dict[tuple[tuple[str, str], ...], EngineOptions] = {}
        self._engine_names = frozenset(param.name or "" for param in _engine.params)
        #: What was converted already: most settings of a file stand in many of its sections.
        self._converted: dict[tuple[str, str], tuple[str, Any]] = {}

    @property
    def warnings(self) -> list[str]:
        """See the class."""
        lines: list[str] = []
        for name, places in self._idle.items():
            more = f" and {len(places) - 1} more" if len(places) > 1 else ""
            lines.append(
                f"{next(iter(places))}{more}: {name} is known to llama-server and has no effect on a model here"
            )
        return lines

    def configure(self, name: str, settings: Sequence[Setting]) -> Draft:
        """Return the model that settings make. Raises BadRequest for a wrong one, with its place and the reason."""
        changed: dict[str, Any] = {}
        for setting in settings:
            known = self._converted.get((setting.key, setting.value)) or self._convert(setting)
            if known is not None:
                _set(changed, *known)
        for option, value in self._explicit.items():
            _set(changed, option, value)
        draft = _draft(name, self._defaults | changed, self._engine_of(changed, settings))
        own = {name: value for name, value in changed.items() if is_sampling(name)}
        defaults = sampling_defaults(self._sampling | own)
        spec = msgspec.structs.replace(draft.spec, defaults=defaults, preset=_section(name, settings))
        draft = msgspec.structs.replace(draft, spec=spec)
        if not defaults:
            return draft
        try:
            check_defaults(defaults)
        except BadRequest as error:
            place = f"{settings[-1].place}: " if settings else ""
            raise BadRequest(f"{place}{error}", code="wrong_setting") from None
        return draft

    def _convert(self, setting: Setting) -> tuple[str, Any] | None:
        """Return which option a setting sets, and to what; None for one that is without effect here."""
        key = self._keys.get(setting.key)
        if key is None:
            flag = find_key(setting.key)
            if flag is None and setting.key in _FORMER:
                self._note(setting.key, setting)
                return None
            if flag is None:
                raise BadRequest(f"{setting.place}: {setting.key!r} is no setting of a model", code="unknown_setting")
            self._note(flag.name.lstrip("-"), setting)
            return None
        option = key.option
        if option.name == "template_source" and setting.value in _TEMPLATES:
            self._note(f"{setting.key} = {setting.value}", setting)
            return None
        try:
            found = option.name or "", _convert(option, key.negated, setting.value, self._context)
        except click.ClickException as error:
            raise BadRequest(f"{setting.place}: {setting.key}: {_reason(error)}", code="wrong_setting") from None
        self._converted[setting.key, setting.value] = found
        return found

    def _note(self, name: str, setting: Setting) -> None:
        self._idle.setdefault(name, {})[setting.place] = None

    def _engine_of(self, changed: Mapping[str, Any], settings: Sequence[Setting]) -> EngineOptions:
        own = {option: value for option, value in changed.items() if option in self._engine_names}
        # By their looks: some settings are objects, which have no hash.
        key = tuple(sorted((option, repr(value)) for option, value in own.items()))
        known = self._engines.get(key)
        if known is None:
            build: Callable[..., EngineOptions] | None = _engine.callback
            assert build is not None
            defaults = {option: self._defaults[option] for option in self._engine_names}
            try:
                known = self._engines[key] = build(**defaults | own)
            except click.ClickException as error:
                place = f"{settings[-1].place}: " if settings else ""
                raise BadRequest(f"{place}{_reason(error)}", code="wrong_setting") from None
        return known


def explicit_settings(context: click.Context) -> dict[str, Any]:
    """Return what a command line itself says, by the options' names: not defaults, and not the environment."""
    return {
        name: value
        for name, value in context.params.items()
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    }


def _section(name: str, settings: Sequence[Setting]) -> str:
    """Return settings as llama-server shows those of a model; of one key the last counts."""
    values = {
        setting.key: shown_address(setting.value) if setting.key in _ADDRESSES else setting.value
        for setting in settings
        if setting.key not in _UNTOLD
    }
    lines = [f"{key} = {value.replace(chr(10), chr(92) + chr(10))}" for key, value in values.items()]
    return "\n".join((f"[{name}]", *lines, "", "")) if lines else ""


def _keys_of(params: Sequence[click.Option]) -> dict[str, _Key]:
    keys: dict[str, _Key] = {}
    for option in params:
        keys |= {name.lstrip("-"): _Key(option, False) for name in option.opts}
        keys |= {name.lstrip("-"): _Key(option, True) for name in option.secondary_opts}
        env = option.envvar if isinstance(option.envvar, str) else ""
        if env:
            keys[env] = _Key(option, False)
            if option.secondary_opts:
                keys[env.replace("LLAMA_ARG_", "LLAMA_ARG_NO_")] = _Key(option, True)
    return keys


def _convert(option: click.Option, negated: bool, text: str, context: click.Context) -> Any:
    if option.is_flag:
        return _Truth().convert(text, option, context) is not negated
    return option.process_value(context, [text] if option.multiple else text)


def _set(values: dict[str, Any], option: str, value: Any) -> None:
    values.update(dict.fromkeys(_EXCLUSIVE.get(option, ())))
    values[option] = value


def _reason(error: click.ClickException) -> str:
    hint = getattr(error, "param_hint", None)
    return f"{hint}: {error.message}" if isinstance(hint, str) else error.message


def _draft(name: str, values: Mapping[str, Any], options: EngineOptions) -> Draft:
    spec = ModelSpec(
        name=name,
        options=options,
        aliases=tuple(_words(values["alias"])),
        tags=tuple(_words(values["tags"])),
        load_on_startup=values["load_on_startup"],
        stop_timeout=values["stop_timeout"],
        sleep_idle_seconds=_seconds(values["sleep_idle_seconds"]),
        unload_idle_seconds=_seconds(values["unload_idle_seconds"]),
        load_stall_seconds=values["load_stall_seconds"],
        pinned=values["pinned"],
        priority=values["priority"],
        replicas=values["replicas"],
        memory=None if values["memory"] is None else values["memory"] * _MIB,
        placements=placements_of(values["gpus"], values["cores"]),
        queue_max=values["queue_max_per_model"],
        queue_timeout=values["queue_timeout"],
    )
    return Draft(
        spec=spec,
        model=values["model"],
        origin=_origin(values),
        dedup=values["dedup_cache_models"],
        mmproj=values["mmproj"].absolute() if values["mmproj"] is not None else None,
        no_mmproj=not values["mmproj_auto"],
    )


def _origin(values: Mapping[str, Any]) -> Origin | None:
    """Return where the files come from. Of a repository of the hub, one of a registry and an address the first counts,
    as in llama-server.
    """
    repo, url = values["hf_repo"], values["model_url"]
    offline, token = values["offline"], values["hf_token"]
    if repo:
        return Origin(repo=repo, file=values["hf_file"], offline=offline, token=token)
    if values["docker_repo"]:
        return Origin(repo=str(parse_docker_name(values["docker_repo"])), offline=offline)
    return Origin(url=url, offline=offline) if url else None


def _seconds(value: float) -> float | None:
    return None if value < 0 else value


def _words(text: str) -> list[str]:
    return [] if not text else list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
