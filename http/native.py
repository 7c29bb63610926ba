"""``POST /completion`` (and ``/completions``, without ``/v1``): llama-server's own way to continue a prompt."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, cast

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from llamaherd.http.answers import Answer, Summary, progress_json, timed, timings_json
from llamaherd.http.choices import start_prompts
from llamaherd.http.delivery import respond
from llamaherd.http.front import Front
from llamaherd.http.logprobs import kept_probs, probs_json
from llamaherd.http.schema import GenerateBody, NativeBody, parse
from llamaherd.pool import Completion, GenerateParams, Piece, Timings, TokenProbs, Usage, with_defaults

__all__ = ["DEFAULT_SETTINGS", "NativeAnswer", "default_settings", "native_completion", "settings_json"]

#: What a request gets that asks for nothing else; the pool's own defaults, under llama-server's names.
DEFAULT_SETTINGS: Final[dict[str, Any]] = {
    "seed": 0xFFFFFFFF,
    "temperature": 0.8,
    "dynatemp_range": 0.0,
    "dynatemp_exponent": 1.0,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.05,
    "top_n_sigma": -1.0,
    "xtc_probability": 0.0,
    "xtc_threshold": 0.1,
    "typical_p": 1.0,
    "repeat_last_n": 64,
    "repeat_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "dry_multiplier": 0.0,
    "dry_base": 1.75,
    "dry_allowed_length": 2,
    "dry_penalty_last_n": 64,
    "dry_sequence_breakers": ["\n", ":", '"', "*"],
    "mirostat": 0,
    "mirostat_tau": 5.0,
    "mirostat_eta": 0.1,
    "adaptive_target": -1.0,
    "adaptive_decay": 0.9,
    "stop": [],
    "max_tokens": -1,
    "n_predict": -1,
    "n_keep": 0,
    "n_discard": 0,
    "ignore_eos": False,
    "stream": False,
    "logit_bias": [],
    "n_probs": 0,
    "post_sampling_probs": False,
    "timings_per_token": False,
    "n_indent": 0,
    "t_max_predict_ms": 0,
    "min_keep": 0,
    "samplers": ["penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"],
    "lora": [],
    "grammar": "",
}


async def native_completion(front: Front, request: Request) -> Response:
    """Continue one prompt, or several."""
    body = parse(await front.read(request), NativeBody)
    works = start_prompts(front, request, body)
    answer = NativeAnswer(works[0].model, body, lambda: front.defaults_of(works[0].model))
    return await respond(front, request, body, works, answer)


def settings_json(body: GenerateBody, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a request was generated with, with the model's defaults: llama-server's ``generation_settings``."""
    params: GenerateParams = with_defaults(body.to_params(), defaults)
    return {**default_settings(cast(Mapping[str, Any], params)), "stream": bool(body.stream)}


def default_settings(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of requests that have these parameters."""
    given = {name: value for name, value in params.items() if name in DEFAULT_SETTINGS and value is not None}
    settings: dict[str, Any] = {**DEFAULT_SETTINGS, **given}
    settings["n_predict"] = settings["max_tokens"]
    if settings["seed"] == -1:
        settings["seed"] = DEFAULT_SETTINGS["seed"]
    if isinstance(settings["stop"], str):
        settings["stop"] = [settings["stop"]]
    settings["logit_bias"] = _biases_json(settings["logit_bias"])
    return settings


def _biases_json(biases: dict[str, Any] | list[Any]) -> list[dict[str, Any]]:
    """Return the biases as llama-server lists them; null stands for "never"."""
    pairs = biases.items() if isinstance(biases, dict) else biases
    return [
        {
            "bias": None if bias is False else bias,
            "token": int(token) if isinstance(token, str) and isinstance(biases, dict) and token.isdecimal() else token,
        }
        for token, bias in pairs
    ]


class NativeAnswer(Answer):
    """llama-server's object, whole or in parts; several make a list. Fields whose content the pool does not know are
    left out. ``defaults`` are asked for at the end: some are known only when the model is loaded.
    """

    ending = b""

    def __init__(self, model: str, body: NativeBody, defaults: Callable[[], Mapping[str, Any]]) -> None:
        self._model = model
        self._body = body
        self._defaults = defaults
        self._prompts = body.shown_prompts()
        self._predicted: Counter[int] = Counter()
        #: The answers with a line break.
        self._broken: set[int] = set()

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any] | list[dict[str, Any]]:
        answers = [self._whole(index, completion) for index, completion in enumerate(completions)]
        return answers[0] if len(answers) == 1 else answers

    def _whole(self, index: int, completion: Completion) -> dict[str, Any]:
        self._note(index, completion.text)
        tokens = completion.tokens if self._body.return_tokens else ()
        piece = msgspec.convert(completion, Piece, from_attributes=True)
        return self._last(index, piece, completion.text, tokens, kept_probs(completion))

    def opening(self, index: int) -> Iterable[dict[str, Any]]:
        return []

    def middle(self, index: int, piece: Piece) -> Iterable[dict[str, Any]]:
        if piece.progress is not None:
            part: dict[str, Any] = {"content": "", "tokens": [], "stop": False, "tokens_predicted": 0}
            return [{"index": index, **part, "prompt_progress": progress_json(piece.progress)}]
        self._predicted[index] += len(piece.tokens)
        self._note(index, piece.text)
        part = {"content": piece.text, "tokens": piece.tokens, "stop": False}
        part["tokens_predicted"] = self._predicted[index]
        return [{"index": index, **part, **timed(piece), **self._probabilities(piece.probs)}]

    def closing(self, index: int, piece: Piece, summary: Summary | None) -> Iterable[dict[str, Any]]:
        return [self._last(index, piece, piece.text, piece.tokens)]

    def _note(self, index: int, text: str) -> None:
        if "\n" in text:
            self._broken.add(index)

    def _probabilities(self, probs: Sequence[TokenProbs]) -> dict[str, Any]:
        if not probs:
            return {}
        post = bool(self._body.post_sampling_probs)
        return {"completion_probabilities": probs_json(probs, self._body.shown_probs or 0, post=post)}

    def _last(
        self, index: int, piece: Piece, text: str, tokens: tuple[int, ...], probs: Sequence[TokenProbs] = ()
    ) -> dict[str, Any]:
        usage = piece.usage or Usage()
        settings = settings_json(self._body, self._defaults())
        stopped = "limit" if piece.finish_reason == "length" else "word" if piece.stopping_word else "eos"
        answer = {
            "index": index,
            "content": text,
            "tokens": tokens,
            "stop": True,
            "model": self._model,
            "id_slot": piece.slot,
            "tokens_predicted": usage.completion_tokens,
            "tokens_evaluated": usage.prompt_tokens,
            "generation_settings": settings,
            "has_new_line": index in self._broken,
            "truncated": piece.truncated,
            "stop_type": stopped,
            "stopping_word": piece.stopping_word,
            "tokens_cached": usage.cached_tokens,
            "timings": timings_json(usage, piece.timings or Timings()),
            **self._probabilities(probs),
        }
        prompt = self._prompts[index // self.per_prompt]
        if prompt is not None:
            answer["prompt"] = prompt
        return answer if not self._body.response_fields else _only(self._body.response_fields, answer)


def _only(fields: list[str], answer: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of these paths, each under its whole path; those that do not exist are left out."""
    chosen: dict[str, Any] = {}
    for path in fields:
        value: Any = answer
        for name in path.split("/"):
            if not isinstance(value, dict) or name not in value:
                break
            value = cast("dict[str, Any]", value)[name]
        else:
            chosen[path] = value
    return chosen
