"""The command line's options of a model's context: what its KV cache is made of, and what becomes of a full one."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, get_args, get_type_hints

import click

from llamaherd.pool import EngineOptions

__all__ = ["CONTEXT_OPTIONS", "context_fields"]

_Command = Callable[..., Any]
_INT32_MAX: Final = 2**31 - 1
_DEFAULTS: Final = EngineOptions()
_CACHE_TYPES: Final[Sequence[str]] = get_args(get_type_hints(EngineOptions)["cache_type_k"])
_MODELS_OWN: Final = "the model's own"


def _number(name: str, env: str, meaning: str, *, least: float = 0.0) -> Callable[[_Command], _Command]:
    """Return an option whose default leaves a number to the model."""
    return click.option(
        name,
        type=click.FloatRange(least, 1e12),
        metavar="N",
        envvar=f"LLAMA_ARG_{env}",
        help=f"{meaning}  [default: {_MODELS_OWN}]",
    )


#: The destination of each is a field of EngineOptions, except for ``rope_scale``.
CONTEXT_OPTIONS: Final[Sequence[Callable[[_Command], _Command]]] = (
    click.option(
        "-ctk",
        "--cache-type-k",
        type=click.Choice(_CACHE_TYPES),
        default=_DEFAULTS.cache_type_k,
        show_default=True,
        envvar="LLAMA_ARG_CACHE_TYPE_K",
        help="Element type of the keys in the KV cache.",
    ),
    click.option(
        "-ctv",
        "--cache-type-v",
        type=click.Choice(_CACHE_TYPES),
        default=_DEFAULTS.cache_type_v,
        show_default=True,
        envvar="LLAMA_ARG_CACHE_TYPE_V",
        help="Element type of the values in the KV cache. The quantised ones need flash attention.",
    ),
    click.option(
        "-cram",
        "--cache-ram",
        type=click.IntRange(-1, _INT32_MAX),
        metavar="MIB",
        default=_DEFAULTS.cache_ram,
        show_default=True,
        envvar="LLAMA_ARG_CACHE_RAM",
        help="RAM of each worker, in MiB, for sequences that had to leave the KV cache. -1 sets no limit, 0 is off.",
    ),
    click.option(
        "--n-cached",
        type=click.IntRange(-1, 256),
        metavar="N",
        default=_DEFAULTS.n_cached,
        show_default=True,
        help="Finished sequences that may stay in the KV cache beside the slots. -1 means three per slot.",
    ),
    click.option(
        "-kvu/-no-kvu",
        "--kv-unified/--no-kv-unified",
        default=_DEFAULTS.kv_unified,
        show_default=True,
        envvar="LLAMA_ARG_KV_UNIFIED",
        help="One KV cache that any request may fill. Without it each slot has its share of the cells, and many long "
        "requests at once are faster.",
    ),
    click.option(
        "--swa-full/--no-swa-full",
        default=_DEFAULTS.swa_full,
        show_default=True,
        envvar="LLAMA_ARG_SWA_FULL",
        help="Keep what has left the window of a sliding-window model, so that any prefix can be reused.",
    ),
    click.option(
        "--context-shift/--no-context-shift",
        default=_DEFAULTS.context_shift,
        show_default=True,
        envvar="LLAMA_ARG_CONTEXT_SHIFT",
        help="Let a generation whose context is full drop its older half and go on, instead of ending.",
    ),
    click.option(
        "--keep",
        "n_keep",
        type=click.IntRange(-1, _INT32_MAX),
        metavar="N",
        default=_DEFAULTS.n_keep,
        show_default=True,
        help="Tokens of the prompt that a context shift keeps. -1 keeps all of it.",
    ),
    click.option(
        "--slot-save-path",
        type=click.Path(exists=True, file_okay=False),
        metavar="PATH",
        help="A folder for saved slots. Without it slots cannot be saved, restored or erased.",
    ),
    click.option(
        "--rope-scaling",
        type=click.Choice(["none", "linear", "yarn"]),
        envvar="LLAMA_ARG_ROPE_SCALING_TYPE",
        help=f"How positions beyond the trained length are scaled.  [default: {_MODELS_OWN}]",
    ),
    _number("--rope-scale", "ROPE_SCALE", "Scale positions down by this factor.", least=1e-3),
    _number("--rope-freq-base", "ROPE_FREQ_BASE", "Base frequency of RoPE."),
    _number("--rope-freq-scale", "ROPE_FREQ_SCALE", "Frequency scale of RoPE: the inverse of --rope-scale."),
    click.option(
        "--yarn-orig-ctx",
        type=click.IntRange(0, _INT32_MAX),
        metavar="N",
        default=0,
        envvar="LLAMA_ARG_YARN_ORIG_CTX",
        help=f"YaRN: the length that the model was trained for.  [default: {_MODELS_OWN}]",
    ),
    _number("--yarn-ext-factor", "YARN_EXT_FACTOR", "YaRN: extrapolation mix factor.", least=-1.0),
    _number("--yarn-attn-factor", "YARN_ATTN_FACTOR", "YaRN: scale of the attention's magnitude.", least=-1.0),
    _number("--yarn-beta-slow", "YARN_BETA_SLOW", "YaRN: high correction dimension.", least=-1.0),
    _number("--yarn-beta-fast", "YARN_BETA_FAST", "YaRN: low correction dimension.", least=-1.0),
)

_FIELDS: Final = (
    "cache_type_k",
    "cache_type_v",
    "cache_ram",
    "n_cached",
    "kv_unified",
    "swa_full",
    "context_shift",
    "n_keep",
    "slot_save_path",
    "rope_scaling",
    "rope_freq_base",
    "rope_freq_scale",
    "yarn_orig_ctx",
    "yarn_ext_factor",
    "yarn_attn_factor",
    "yarn_beta_slow",
    "yarn_beta_fast",
)


def context_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Return what these options say, as fields of EngineOptions; what was not given is left out.

    Raises:
        click.UsageError: ``--rope-scale`` and ``--rope-freq-scale`` are both given.
    """
    fields = {name: values[name] for name in _FIELDS if values.get(name) is not None}
    if fields.get("slot_save_path"):
        fields["slot_save_path"] = str(Path(fields["slot_save_path"]).absolute())
    scale = values.get("rope_scale")
    if scale is not None:
        if "rope_freq_scale" in fields:
            raise click.UsageError("--rope-scale and --rope-freq-scale say the same thing: give one of them.")
        fields["rope_freq_scale"] = 1.0 / scale
    return fields
