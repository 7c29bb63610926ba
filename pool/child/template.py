"""Chat messages to prompt text, by the Jinja template that came with the model.

A model file is untrusted input, so the template runs in Jinja's immutable sandbox, and what it may use is bounded on
top: time, output, the size of every value it computes. The bounds are checked wherever a template can loop, call or
grow a value; a single filter over a large value may still overrun them somewhat, which costs the worker and never the
pool.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
from jinja2 import Template, TemplateError

from llamaherd.pool.child.engine import RequestError
from llamaherd.pool.child.sandbox import BoundedEnvironment, Bounds, OverBounds

__all__ = ["CHATML", "ChatTemplate"]

#: Used when a model brings no template, as llama.cpp does.
CHATML: Final = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
_MOST_SOURCE: Final = 1_000_000
_NEEDLE: Final = "needle-7f3a"
_ERROR_LIMIT: Final = 500


class ChatTemplate:
    """The template of one model. A broken one fails the chat requests and nothing else.

    Args:
        source: Jinja source; empty takes ChatML.
        bos: Text of the token that begins a prompt, empty for none; ``eos`` likewise.
        adds_bos: Whether tokenising adds that token anyway; the template's own copy is cut off then.
    """

    def __init__(
        self, source: str, *, bos: str = "", eos: str = "", adds_bos: bool = False, adds_eos: bool = False
    ) -> None:
        self._source: Final = source or CHATML
        self._bos, self._eos = bos, eos
        self._cut_bos: Final = bos if adds_bos else ""
        self._cut_eos: Final = eos if adds_eos else ""
        self._compiled: Template | None = None
        self._takes_parts: bool | None = None
        self._environment = BoundedEnvironment()

    def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        """Return the prompt, generation prompt included.

        ``variables`` reach the template by name and may override ``add_generation_prompt``.

        Raises:
            RequestError: ``template_invalid`` when it does not compile, ``template_failed`` when it refused the
                messages or went out of bounds, ``unsupported_content`` for parts that are not text.
        """
        template = self._compile()
        text = self._run(template, self._with_plain_content(template, messages), variables)
        return text.removeprefix(self._cut_bos).removesuffix(self._cut_eos)

    def _compile(self) -> Template:
        if self._compiled is None:
            if len(self._source) > _MOST_SOURCE:
                raise RequestError(f"the chat template has {len(self._source)} characters", code="template_invalid")
            try:
                self._compiled = self._environment.from_string(self._source)
            except Exception as error:  # a hostile source finds more ways to fail than Jinja's own errors
                raise RequestError(
                    f"the model's chat template does not compile: {_say(error)}", code="template_invalid"
                ) from error
        return self._compiled

    def _run(self, template: Template, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        values = {
            "bos_token": self._bos,
            "eos_token": self._eos,
            "add_generation_prompt": True,
            **variables,
            "messages": messages,
        }
        try:
            with self._environment.bounded(Bounds()) as bounds:
                return bounds.collect(template.generate(values))
        except (TemplateError, OverBounds) as error:
            raise RequestError(f"the chat template refused: {_say(error)}", code="template_failed") from error
        except Exception as error:  # whatever a template's operations raise: TypeError, RecursionError, MemoryError ...
            raise RequestError(f"the chat template failed: {_say(error)}", code="template_failed") from error

    def _with_plain_content(
        self, template: Template, messages: Sequence[Mapping[str, Any]]
    ) -> Sequence[Mapping[str, Any]]:
        """Join content given as a list of text parts, unless the template reads such lists itself."""
        if not any(isinstance(message.get("content"), list) for message in messages):
            return messages
        texts = [_text_of(message.get("content")) for message in messages]
        if self._takes_parts is None:
            self._takes_parts = self._probe(template)
        if self._takes_parts:
            return messages
        return [
            message if text is None else {**message, "content": text}
            for message, text in zip(messages, texts, strict=True)
        ]

    def _probe(self, template: Template) -> bool:
        parts = [{"type": "text", "text": _NEEDLE}]
        try:
            shown = self._run(template, [{"role": "user", "content": parts}], {})
        except RequestError:
            return False
        return _NEEDLE in shown and "'type'" not in shown and '"type"' not in shown


class _TextPart(msgspec.Struct, tag_field="type", tag="text"):
    """OpenAI's ``{"type": "text", "text": ...}``."""

    text: str


def _text_of(content: object) -> str | None:
    """Return a list of text parts as one text; None for what is not a list."""
    if not isinstance(content, list):
        return None
    try:
        parts = msgspec.convert(content, list[_TextPart])
    except msgspec.ValidationError as error:
        raise RequestError(f"this model takes text content only: {error}", code="unsupported_content") from error
    return "\n".join(part.text for part in parts)


def _say(error: BaseException) -> str:
    where = getattr(error, "lineno", None)
    text = f"{error}" or type(error).__name__
    return f"{text[:_ERROR_LIMIT]} (line {where})" if where else text[:_ERROR_LIMIT]
