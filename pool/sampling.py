"""What sampling parameters may be: the ranges and names that the pool checks for its callers, and the engine again.

The names are llama-server's. Most ranges are too; the others are where the arithmetic of llama.cpp's samplers would
turn into infinities.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from llamaherd.transport.messages import Sampling

__all__ = [
    "FILE_KEYS",
    "LIMITS",
    "MAX_BIASES",
    "MAX_BREAKERS",
    "MAX_SAMPLERS",
    "SAMPLER_NAMES",
    "problem_of",
    "sampler_name",
]

_INT: Final = 2**31 - 1
_LARGE: Final = 1e6

#: The least and the greatest value of every number in :class:`Sampling`; all must be finite.
LIMITS: Final[Mapping[str, tuple[float, float]]] = MappingProxyType(
    {
        "temperature": (-math.inf, math.inf),
        "dynatemp_range": (0, _LARGE),
        "dynatemp_exponent": (0, _LARGE),
        "top_k": (-1, _INT),
        "top_p": (0, 1),
        "min_p": (0, 1),
        "typical_p": (0, 1),
        "top_n_sigma": (-math.inf, math.inf),
        "xtc_probability": (0, 1),
        "xtc_threshold": (0, 1),
        "min_keep": (0, _INT),
        "repeat_last_n": (-1, _INT),
        "repeat_penalty": (1 / _LARGE, _LARGE),
        "presence_penalty": (-_LARGE, _LARGE),
        "frequency_penalty": (-_LARGE, _LARGE),
        "dry_multiplier": (0, _LARGE),
        "dry_base": (1, _LARGE),
        "dry_allowed_length": (0, _INT),
        "dry_penalty_last_n": (-1, _INT),
        "mirostat": (0, 2),
        "mirostat_tau": (0, _LARGE),
        "mirostat_eta": (0, _LARGE),
        "adaptive_target": (-math.inf, 1),
        "adaptive_decay": (0, 0.99),
        "n_probs": (0, 100),
        "seed": (0, 2**32 - 1),
    }
)
#: What a model's file may recommend, by the key that it has there (llama.cpp's ``llama_model_meta_key``).
FILE_KEYS: Final[Mapping[str, str]] = MappingProxyType(
    {
        name: f"general.sampling.{key}"
        for name, key in (
            ("samplers", "sequence"),
            ("top_k", "top_k"),
            ("top_p", "top_p"),
            ("min_p", "min_p"),
            ("xtc_probability", "xtc_probability"),
            ("xtc_threshold", "xtc_threshold"),
            ("temperature", "temp"),
            ("repeat_last_n", "penalty_last_n"),
            ("repeat_penalty", "penalty_repeat"),
            ("mirostat", "mirostat"),
            ("mirostat_tau", "mirostat_tau"),
            ("mirostat_eta", "mirostat_eta"),
        )
    }
)
#: What ``samplers`` may name.
SAMPLER_NAMES: Final = frozenset({*Sampling().samplers, "adaptive_p"})
MAX_SAMPLERS: Final = 32
MAX_BREAKERS: Final = 32
#: llama.cpp cuts longer sequence breakers, in bytes.
_LONGEST_BREAKER: Final = 40
MAX_BIASES: Final = 4096
_LONGEST_BIASED_TEXT: Final = 256

_ALIASES: Final = MappingProxyType({"typical_p": "typ_p", "typ": "typ_p", "temp": "temperature", "nucleus": "top_p"})
_SQUEEZED: Final = MappingProxyType({name.replace("_", ""): name for name in SAMPLER_NAMES})


def sampler_name(text: str) -> str | None:
    """Return the sampler that a name in any of the reference's spellings means (``top-k``, ``topk``), or None."""
    name = text.lower().replace("-", "_")
    name = _ALIASES.get(name, name)
    return name if name in SAMPLER_NAMES else _SQUEEZED.get(name)


def problem_of(sampling: Sampling) -> str | None:
    """Say what is wrong with the values, the first fault only; None when every one of them can be used.

    Whether the tokens of ``logit_bias`` exist is the model's to know.
    """
    for name, (low, high) in LIMITS.items():
        value = getattr(sampling, name)
        if not (low <= value <= high and math.isfinite(value)):
            wanted = "a finite number" if math.isinf(low) else f"{low:.10g} to {high:.10g}"
            return f"{name} is {value}; it must be {wanted}"
    unknown = [name for name in sampling.samplers if name not in SAMPLER_NAMES]
    if unknown:
        return f"samplers: there is no {unknown[0]!r}; known are {', '.join(sorted(SAMPLER_NAMES))}"
    if len(sampling.samplers) > MAX_SAMPLERS:
        return f"samplers has {len(sampling.samplers)} names; at most {MAX_SAMPLERS} are taken"
    return _breakers_problem(sampling.dry_sequence_breakers) or _bias_problem(sampling)


def _breakers_problem(breakers: tuple[str, ...]) -> str | None:
    if len(breakers) > MAX_BREAKERS:
        return f"dry_sequence_breakers has {len(breakers)} texts; at most {MAX_BREAKERS} are taken"
    for text in breakers:
        if not 0 < len(text.encode("utf-8", "replace")) <= _LONGEST_BREAKER or "\0" in text:
            return f"dry_sequence_breakers: {text[:50]!r} must have 1 to {_LONGEST_BREAKER} bytes and no NUL"
    return None


def _bias_problem(sampling: Sampling) -> str | None:
    if len(sampling.logit_bias) > MAX_BIASES:
        return f"logit_bias has {len(sampling.logit_bias)} entries; at most {MAX_BIASES} are taken"
    for target, bias in sampling.logit_bias:
        if isinstance(target, str) and not 0 < len(target) <= _LONGEST_BIASED_TEXT:
            return f"logit_bias: a text must have 1 to {_LONGEST_BIASED_TEXT} characters"
        if bias is not None and not math.isfinite(bias):
            return f"logit_bias of {target!r} is {bias}; it must be a finite number, or false"
    return None
