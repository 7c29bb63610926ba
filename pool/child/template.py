"""Chat messages to prompt text, by the Jinja template that came with the model.

A model file is untrusted input, so the template runs in Jinja's immutable sandbox, and what it may use is bounded on
top: time, output, the size of every value it computes. The bounds are checked wherever a template can loop, call or
grow a value; a single filter over a large value may still overrun them somewhat, which costs the worker and never the
pool.
"""

import contextlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, Final

from jinja2 import Template, TemplateError

from llamaherd.pool.child.conversation import prepared
from llamaherd.pool.child.engine import RequestError
from llamaherd.pool.child.sandbox import BoundedEnvironment, Bounds, OverBounds
from llamaherd.pool.child.text import sendable
from llamaherd.pool.child.traits import Traits

__all__ = ["CHATML", "ChatTemplate"]

#: Used when a model brings no template, as llama.cpp does.
CHATML: Final = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
_MOST_SOURCE: Final = 1_000_000
#: The templates of known models have up to some 20,000 characters, which compile in about 20 ms.
_QUICK_SOURCE: Final = 50_000
#: Time for one prompt, and for one of the questions that find out what a template can do.
_SECONDS: Final = 5.0
_PROBE_SECONDS: Final = 1.0
#: Templates of models that know the role ``developer``, and call reasoning ``thinking``, speak of channels.
_CHANNEL: Final = "<|channel|>"
#: What switches off that old reasoning is kept in the prompt, or on; every family has its own word for it.
_FORGET_REASONING: Final = ("clear_thinking", "truncate_history_thinking", "drop_thinking")
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
        #: Its Jinja source.
        self.source: Final = source or CHATML
        self._bos, self._eos = bos, eos
        self._cut_bos: Final = bos if adds_bos else ""
        self._cut_eos: Final = eos if adds_eos else ""
        self._compiled: Template | None = None
        self._environment = BoundedEnvironment()

    def prepare(self) -> None:
        """Compile it ahead of the first request, unless it is so large that the load would feel it."""
        if len(self.source) <= _QUICK_SOURCE:
            with contextlib.suppress(RequestError):
                self._compile()

    def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        """Return the prompt, generation prompt included.

        ``variables`` reach the template by name and may override ``add_generation_prompt``.

        Raises:
            RequestError: ``template_invalid`` when it does not compile, ``template_failed`` when it refused the
                messages or went out of bounds, ``unsupported_content`` for parts that are not text.
        """
        return self.run(prepared(messages, self.traits, harmony=_CHANNEL in self.source), variables)

    @cached_property
    def traits(self) -> Traits:
        """What the template can do."""
        return Traits(lambda messages, variables: self.run(messages, variables, seconds=_PROBE_SECONDS))

    def run(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], *, seconds: float = _SECONDS
    ) -> str:
        """As :meth:`render`, with the messages as they are."""
        text = self._run(self._compile(), messages, variables, seconds)
        return sendable(text).removeprefix(self._cut_bos).removesuffix(self._cut_eos)

    def _compile(self) -> Template:
        if self._compiled is None:
            if len(self.source) > _MOST_SOURCE:
                raise RequestError(f"the chat template has {len(self.source)} characters", code="template_invalid")
            try:
                self._compiled = self._environment.from_string(self.source)
            except Exception as error:  # a hostile source finds more ways to fail than Jinja's own errors
                raise RequestError(
                    f"the model's chat template does not compile: {_say(error)}", code="template_invalid"
                ) from error
        return self._compiled

    def _run(
        self,
        template: Template,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        seconds: float,
    ) -> str:
        values = {
            "bos_token": self._bos,
            "eos_token": self._eos,
            "add_generation_prompt": True,
            "enable_thinking": True,
            **_dates(),
            **_reasoning(variables),
            **variables,
            "messages": messages,
        }
        try:
            with self._environment.bounded(Bounds(seconds=seconds)) as bounds:
                return bounds.collect(template.generate(values))
        except (TemplateError, OverBounds) as error:
            raise RequestError(f"the chat template refused: {_say(error)}", code="template_failed") from error
        except Exception as error:  # whatever a template's operations raise: TypeError, RecursionError, MemoryError ...
            raise RequestError(f"the chat template failed: {_say(error)}", code="template_failed") from error


def _dates() -> dict[str, str]:
    """Return the date under the names that templates know from the reference."""
    now = datetime.now().astimezone()
    return {"datetime": now.strftime("%b %d %Y"), "date_string": now.strftime("%d %b %Y")}


def _reasoning(variables: Mapping[str, Any]) -> dict[str, bool]:
    """Return what ``preserve_reasoning``, the reference's word, means in the words of the templates."""
    preserve = variables.get("preserve_reasoning")
    if not isinstance(preserve, bool):
        return {}
    return {"preserve_thinking": preserve, **dict.fromkeys(_FORGET_REASONING, not preserve)}


def _say(error: BaseException) -> str:
    where = getattr(error, "lineno", None)
    text = sendable(f"{error}") or type(error).__name__
    return f"{text[:_ERROR_LIMIT]} (line {where})" if where else text[:_ERROR_LIMIT]
