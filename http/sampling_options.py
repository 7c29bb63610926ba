"""The command line's options of how requests are sampled that do not say it themselves, under llama-server's names."""

import re
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import click
import msgspec

from llamaherd.http.letters import SAMPLER_LETTERS
from llamaherd.http.options import Whole

__all__ = ["SAMPLING_OPTIONS", "is_sampling", "sampling_defaults"]

_Command = Callable[..., Any]
_INT32_MAX: Final = 2**31 - 1
_PREFIX: Final = "default_"
#: Most characters of a file that are read; grammars have a lower limit of their own.
_MOST_CONTENT: Final = 1024 * 1024
_LETTERS_OPTION: Final = "sampler_letters"
_BIAS: Final = re.compile(r"\s*(\d{1,10})\s*([+-])\s*(\d+(?:\.\d*)?|\.\d+|inf)\s*")


class _Names(click.ParamType[tuple[str, ...]]):
    """Samplers, separated by semicolons."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return cast("tuple[str, ...]", value)
        return tuple(word.strip() for word in str(value).split(";") if word.strip())


class _Letters(click.ParamType[tuple[str, ...]]):
    """Samplers, a letter for each."""

    name = "letters"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return cast("tuple[str, ...]", value)
        unknown = [letter for letter in value if letter not in SAMPLER_LETTERS]
        if unknown:
            self.fail(f"no sampler is called {unknown[0]!r}; known are {''.join(SAMPLER_LETTERS)}.", param, ctx)
        return tuple(SAMPLER_LETTERS[letter] for letter in value)


class _Content(click.ParamType[str]):
    """A file, as the text in it."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            with open(value, encoding="utf-8") as file:
                return file.read(_MOST_CONTENT)
        except (OSError, ValueError) as error:
            self.fail(f"{value} cannot be read: {getattr(error, 'strerror', None) or error}.", param, ctx)


class _Schema(click.ParamType[dict[str, Any]]):
    """A JSON Schema, as JSON."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        try:
            return msgspec.json.decode(value, type=dict[str, Any])
        except (msgspec.DecodeError, RecursionError) as error:
            self.fail(f"it is no JSON Schema: {error}.", param, ctx)


class _SchemaFile(_Schema):
    """A JSON Schema, in a file."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        return super().convert(_Content().convert(value, param, ctx), param, ctx)


class _Bias(click.ParamType[tuple[int, float]]):
    """A token's id with a signed number behind it, ``15043+1``; ``-inf`` rules the token out."""

    name = "id±bias"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, float]:
        if isinstance(value, tuple):
            return cast("tuple[int, float]", value)
        match = _BIAS.fullmatch(value)
        if match is None or match[2] + match[3] == "+inf":
            self.fail(f"{value!r} is not a token's id and a bias, such as 15043+1 or 15043-inf.", param, ctx)
        return int(match[1]), float(match[2] + match[3])


def _number(name: str, field: str, meaning: str, *more: str, whole: bool = False, env: str = "") -> Any:
    return click.option(
        name,
        *more,
        f"{_PREFIX}{field}",
        type=Whole(-1) if whole else float,
        metavar="N",
        default=None,
        envvar=f"LLAMA_ARG_{env}" if env else None,
        help=meaning,
    )


#: The destination of each is ``default_`` and a field of ``GenerateParams``, but for ``--sampler-seq``.
SAMPLING_OPTIONS: Final[Sequence[Callable[[_Command], _Command]]] = (
    _number(
        "-n",
        "max_tokens",
        "Most tokens of an answer.",
        "--predict",
        "--n-predict",
        whole=True,
        env="N_PREDICT",
    ),
    click.option(
        "--samplers", "default_samplers", type=_Names(), metavar="NAMES", help="Samplers in their order: a;b;c."
    ),
    click.option(
        "--sampler-seq",
        "--sampling-seq",
        _LETTERS_OPTION,
        type=_Letters(),
        metavar="LETTERS",
        help="The same, a letter for each.",
    ),
    click.option(
        "-s",
        "--seed",
        "default_seed",
        type=Whole(-1, 2**32 - 1),
        metavar="N",
        help="Seed. -1 draws one for each request.",
    ),
    click.option(
        "--ignore-eos", "default_ignore_eos", is_flag=True, default=None, help="Go on past the end of a text."
    ),
    _number("--temp", "temperature", "Temperature.", "--temperature", env="TEMPERATURE"),
    _number("--top-k", "top_k", "Keep the N likeliest tokens.", whole=True, env="TOP_K"),
    _number("--top-p", "top_p", "Keep the likeliest tokens that make up this share.", env="TOP_P"),
    _number("--min-p", "min_p", "Drop tokens below this share of the likeliest.", env="MIN_P"),
    _number("--top-nsigma", "top_n_sigma", "Keep tokens within N standard deviations.", "--top-n-sigma"),
    _number("--xtc-probability", "xtc_probability", "How often XTC is applied."),
    _number("--xtc-threshold", "xtc_threshold", "XTC's threshold."),
    _number("--typical", "typical_p", "Locally typical sampling.", "--typical-p"),
    _number("--repeat-last-n", "repeat_last_n", "Tokens that penalties look back.", whole=True),
    _number("--repeat-penalty", "repeat_penalty", "Penalty of repeated tokens."),
    _number("--presence-penalty", "presence_penalty", "Penalty of tokens that are there."),
    _number("--frequency-penalty", "frequency_penalty", "Penalty of tokens by how often they are there."),
    _number("--dry-multiplier", "dry_multiplier", "DRY's multiplier."),
    _number("--dry-base", "dry_base", "DRY's base."),
    _number("--dry-allowed-length", "dry_allowed_length", "Repetition that DRY allows.", whole=True),
    _number("--dry-penalty-last-n", "dry_penalty_last_n", "Tokens that DRY looks back.", whole=True),
    click.option(
        "--dry-sequence-breaker",
        "default_dry_sequence_breakers",
        multiple=True,
        metavar="TEXT",
        help="What ends a repetition, in place of the usual. May be repeated; 'none' is none.",
    ),
    _number("--adaptive-target", "adaptive_target", "Probability that adaptive-p aims at."),
    _number("--adaptive-decay", "adaptive_decay", "How slowly adaptive-p adapts."),
    _number("--dynatemp-range", "dynatemp_range", "Range of the dynamic temperature."),
    _number("--dynatemp-exp", "dynatemp_exponent", "Its exponent."),
    _number("--mirostat", "mirostat", "Mirostat, 1 or 2.", whole=True),
    _number("--mirostat-lr", "mirostat_eta", "Its learning rate."),
    _number("--mirostat-ent", "mirostat_tau", "Its target entropy."),
    click.option(
        "-l",
        "--logit-bias",
        "default_logit_bias",
        type=_Bias(),
        multiple=True,
        metavar="ID±BIAS",
        help="Change a token's logit: 15043+1, 15043-inf. May be repeated.",
    ),
    click.option("--grammar", "default_grammar", metavar="GBNF", help="What answers must follow, beginning at root."),
    click.option("--grammar-file", "default_grammar_file", type=_Content(), metavar="PATH", help="The same in a file."),
    click.option(
        "-j",
        "--json-schema",
        "default_json_schema",
        type=_Schema(),
        metavar="JSON",
        help="The JSON Schema that answers must follow; {} is any object.",
    ),
    click.option(
        "-jf",
        "--json-schema-file",
        "default_json_schema_file",
        type=_SchemaFile(),
        metavar="PATH",
        help="The same in a file.",
    ),
)


def is_sampling(name: str) -> bool:
    """Whether an option is one of these, by its destination."""
    return name.startswith(_PREFIX) or name == _LETTERS_OPTION


def sampling_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Take these options out of a command's values; return what they say, as fields of ``GenerateParams``."""
    names = [name for name in values if is_sampling(name)]
    found = {name.removeprefix(_PREFIX): values.pop(name) for name in names}
    letters = found.pop(_LETTERS_OPTION, None)
    found["samplers"] = letters if found.get("samplers") is None else found["samplers"]
    for name in ("grammar", "json_schema"):
        from_file = found.pop(f"{name}_file", None)
        found[name] = found.get(name) if from_file is None else from_file
    # No samplers draw from the model's own distribution; of what may come several times, none says nothing.
    unsaid = {name for name, value in found.items() if value is None or (value == () and name != "samplers")}
    defaults = {name: value for name, value in found.items() if name not in unsaid}
    breakers = defaults.get("dry_sequence_breakers")
    if breakers is not None:
        defaults["dry_sequence_breakers"] = () if "none" in breakers else breakers
    if "logit_bias" in defaults:
        defaults["logit_bias"] = tuple(
            (token, False if bias == float("-inf") else bias) for token, bias in defaults["logit_bias"]
        )
    return defaults
