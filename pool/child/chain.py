"""Which samplers a request needs, in which order: decided here, built in ``sampler.py``.

Pure. What is switched off is left out, and a chain that would only ever take the highest logit is no chain at all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from llamaherd.transport.messages import Sampling

__all__ = ["Step", "keeps", "look_back", "memory", "plan"]

#: Candidates that stay when the caller switched ``top_k`` off: sorting a whole vocabulary costs milliseconds per token,
#: and what lies beyond a thousand has no weight that the samplers which sort would keep.
_WIDE_TOP_K: Final = 1000
#: Outside of these a temperature turns logits into infinities; inside, it makes no difference.
_COLDEST, _HOTTEST = 1e-20, 1e6
#: Tokens from which mirostat estimates the distribution's shape.
_MIROSTAT_SAMPLE: Final = 100


@dataclass(frozen=True)
class Step:
    """One sampler: its kind, which is the name of its maker in ``llama_sampler``, and the arguments."""

    kind: str
    values: tuple[float, ...] = ()


def plan(sampling: Sampling, n_vocab: int, context: int, *, biased: bool) -> list[Step] | None:
    """Return the samplers for checked parameters; None when the highest logit is always the answer.

    ``dry`` and ``logit_bias`` come without arguments: those are no numbers.

    Args:
        context: Most tokens of a sequence; nothing looks back further.
        biased: Whether some logits are changed before everything else.
    """
    first = [Step("logit_bias")] if biased else []
    if sampling.mirostat:
        steps = list(_mirostat(sampling, n_vocab))
    else:
        steps = _sorted_cheaply(list(_chosen(sampling, n_vocab, context)))
    if not first and _is_greedy(steps):
        return None
    return first + steps


def memory(sampling: Sampling, steps: Sequence[Step], context: int) -> int:
    """Return how many tokens of the prompt the samplers want to know of."""
    wanted = [
        look_back(last_n, context)
        for kind, last_n in (("penalties", sampling.repeat_last_n), ("dry", sampling.dry_penalty_last_n))
        if any(step.kind == kind for step in steps)
    ]
    return max(wanted, default=0)


def keeps(steps: Sequence[Step]) -> int:
    """Return how many candidates a chain keeps, if it cuts them down before anything looks at all of them; else 0.

    What only moves logits of some tokens may come before the cut.
    """
    for step in steps:
        if step.kind == "top_k":
            return int(step.values[0])
        if step.kind not in {"logit_bias", "penalties", "dry"}:
            return 0
    return 0


def look_back(last_n: int, context: int) -> int:
    """Return how many tokens a sampler remembers. It allocates all of them at once, so never more than there can be."""
    return context if last_n < 0 else min(last_n, context)


def _temperature(sampling: Sampling) -> float:
    return 0.0 if sampling.temperature < _COLDEST else min(sampling.temperature, _HOTTEST)


def _mirostat(sampling: Sampling, n_vocab: int) -> Iterator[Step]:
    yield Step("temp", (_temperature(sampling),))
    if sampling.mirostat == 1:
        tau, eta = sampling.mirostat_tau, sampling.mirostat_eta
        yield Step("mirostat", (n_vocab, sampling.seed, tau, eta, _MIROSTAT_SAMPLE))
    else:
        yield Step("mirostat_v2", (sampling.seed, sampling.mirostat_tau, sampling.mirostat_eta))


def _chosen(sampling: Sampling, n_vocab: int, context: int) -> Iterator[Step]:
    last = Step("dist", (sampling.seed,))
    for name in sampling.samplers:
        if name == "adaptive_p":
            # It draws the token itself, so it can only come last.
            last = Step("adaptive_p", (sampling.adaptive_target, sampling.adaptive_decay, sampling.seed))
            continue
        step = _step(name, sampling, n_vocab, context)
        if step is not None:
            yield step
    yield last


def _step(name: str, sampling: Sampling, n_vocab: int, context: int) -> Step | None:
    """Return the sampler of that name, None when it is switched off."""
    keep = sampling.min_keep
    repeat, frequency, presence = sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty
    last_n = look_back(sampling.repeat_last_n, context)
    xtc = (sampling.xtc_probability, sampling.xtc_threshold)
    steps = {
        "penalties": (
            last_n != 0 and (repeat != 1 or frequency != 0 or presence != 0),
            Step("penalties", (n_vocab, last_n, repeat, frequency, presence)),
        ),
        "dry": (sampling.dry_multiplier != 0 and sampling.dry_penalty_last_n != 0, Step("dry")),
        "top_n_sigma": (sampling.top_n_sigma > 0, Step("top_n_sigma", (sampling.top_n_sigma,))),
        "top_k": (sampling.top_k > 0, Step("top_k", (sampling.top_k,))),
        "typ_p": (sampling.typical_p < 1, Step("typical", (sampling.typical_p, keep))),
        "top_p": (sampling.top_p < 1, Step("top_p", (sampling.top_p, keep))),
        "min_p": (sampling.min_p > 0, Step("min_p", (sampling.min_p, keep))),
        "xtc": (xtc[0] > 0 and xtc[1] <= 0.5, Step("xtc", (*xtc, keep, sampling.seed))),
        "temperature": (True, _temperature_step(sampling)),
    }
    wanted, step = steps[name]
    return step if wanted else None


def _temperature_step(sampling: Sampling) -> Step:
    temperature = _temperature(sampling)
    if sampling.dynatemp_range > 0:
        return Step("temp_ext", (temperature, sampling.dynatemp_range, sampling.dynatemp_exponent))
    return Step("temp", (temperature,))


def _sorted_cheaply(steps: list[Step]) -> list[Step]:
    """Cut the candidates down before the first sampler that sorts them, unless something already did."""
    for index, step in enumerate(steps):
        if step.kind == "top_k":
            break
        if step.kind in {"typical", "top_p", "xtc", "temp_ext"}:
            return [*steps[:index], Step("top_k", (_WIDE_TOP_K,)), *steps[index:]]
    return steps


def _is_greedy(steps: list[Step]) -> bool:
    """Whether no draw and no sampler can give anything but the highest logit."""
    kinds = {step.kind for step in steps}
    if not kinds <= {"top_n_sigma", "top_k", "top_p", "min_p", "temp", "dist", "mirostat", "mirostat_v2"}:
        return False
    return Step("temp", (0.0,)) in steps or Step("top_k", (1,)) in steps
