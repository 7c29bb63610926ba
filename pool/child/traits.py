"""What a chat template can do, found out by rendering conversations that it must show in a telling way.

Asked once for each model, and only when a request needs to know: most never do.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Final

from llamaherd.pool.child.engine import RequestError

__all__ = ["Render", "Traits"]

#: Renders messages with variables. Raises RequestError.
Render = Callable[[Sequence[Mapping[str, Any]], Mapping[str, Any]], str]

_NEEDLE: Final = "needle7f3a"
_KEY: Final = "key7f3a"
_HELLO: Final = {"role": "user", "content": "Hello"}
_TOOL: Final = {
    "type": "function",
    "function": {
        "name": _NEEDLE,
        "description": "A tool.",
        "parameters": {
            "type": "object",
            "properties": {_KEY: {"type": "string", "description": "A."}},
            "required": [_KEY],
        },
    },
}


class Traits:
    """The abilities of one template.

    Args:
        render: Renders it as it is.
    """

    def __init__(self, render: Render) -> None:
        self._render: Final = render

    def _shown(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """Return what is rendered; empty if the template refuses."""
        try:
            return self._render(messages, variables)
        except RequestError:
            return ""

    @cached_property
    def takes_parts(self) -> bool:
        """Whether content may be a list of parts."""
        shown = self._shown([{"role": "user", "content": [{"type": "text", "text": _NEEDLE}]}])
        return _NEEDLE in shown and "'type'" not in shown and '"type"' not in shown

    @cached_property
    def takes_text(self) -> bool:
        """Whether content may be a text."""
        return _NEEDLE in self._shown([{"role": "user", "content": _NEEDLE}])

    @cached_property
    def takes_system(self) -> bool:
        """Whether there may be a system message."""
        return _NEEDLE in self._shown([{"role": "system", "content": self._content(_NEEDLE)}, self._hello])

    @cached_property
    def takes_tools(self) -> bool:
        """Whether it tells the model of tools."""
        return _NEEDLE in self._shown([self._hello], tools=[_TOOL])

    @cached_property
    def takes_calls(self) -> bool:
        """Whether it shows the tool calls of earlier messages."""
        return _NEEDLE in self._with_call({_KEY: "x"}) or _NEEDLE in self._with_call(f'{{"{_KEY}": "x"}}')

    @cached_property
    def takes_objects(self) -> bool:
        """Whether the arguments of calls must be objects; otherwise they are texts, as clients send them."""
        shown = self._with_call({_KEY: "x"})
        if _KEY in shown and f"'{_KEY}'" not in shown:
            return True
        shown = self._with_call(f'{{"{_KEY}": "x"}}')
        return _KEY not in shown or f'\\"{_KEY}' in shown

    @cached_property
    def takes_parallel_calls(self) -> bool:
        """Whether one message may hold several calls."""
        return self._with_call({_KEY: "x"}, {_KEY: "y"}).count(_NEEDLE) > 1

    def reasoning_frame(self, start: str, end: str) -> tuple[str, str] | None:
        """Return what it writes before and after the reasoning of a last message; None if it does not show it."""
        message = {"role": "assistant", "content": self._content(_NEEDLE), "reasoning_content": _KEY}
        before, found, after = self._shown([self._hello, message], add_generation_prompt=False).partition(_KEY)
        begin, stop = before.rfind(start), after.find(_NEEDLE)
        if not found or begin < 0 or stop < 0 or end not in after[:stop]:
            return None
        return before[begin:], after[:stop]

    def _content(self, text: str) -> Any:
        return text if self.takes_text or not self.takes_parts else [{"type": "text", "text": text}]

    @property
    def _hello(self) -> Mapping[str, Any]:
        return {**_HELLO, "content": self._content("Hello")}

    def _with_call(self, *arguments: object) -> str:
        calls = [
            {"id": f"call0000{index}", "type": "function", "function": {"name": _NEEDLE, "arguments": given}}
            for index, given in enumerate(arguments)
        ]
        empty = self._content("")
        answers = [
            {"role": "tool", "tool_call_id": f"call0000{index}", "name": "tool", "content": self._content("done")}
            for index in range(len(arguments))
        ]
        messages = [self._hello, {"role": "assistant", "content": empty, "tool_calls": calls}, *answers]
        end = [{"role": "assistant", "content": self._content("It is done.")}, self._hello]
        return self._shown([*messages, *end]) or self._shown(messages)
