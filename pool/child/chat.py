"""One model's conversations: which template renders one, and how what the model answers is to be read."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from llamaherd.pool.child.calls import Calls
from llamaherd.pool.child.calls_tagged import kinds_of
from llamaherd.pool.child.conversation import describe_tools, text_of, with_instruction
from llamaherd.pool.child.dialect import Dialect, dialect_of
from llamaherd.pool.child.engine import RequestError
from llamaherd.pool.child.reply import Reply
from llamaherd.pool.child.template import ChatTemplate
from llamaherd.pool.child.thinking import Tags, tags_of
from llamaherd.pool.child.vocab import Vocab
from llamaherd.transport.messages import ChatOptions, EngineOptions

__all__ = ["Chats", "Turn"]

Messages = Sequence[Mapping[str, Any]]


class Turn(NamedTuple):
    """What a chat request comes to.

    Attributes:
        prompt: The conversation as text.
        reply: Reads the answer; None where the answer is content and nothing else.
        shown: Control tokens whose text is part of the answer.
    """

    prompt: str
    reply: Reply | None = None
    shown: frozenset[int] = frozenset()


class Chats:
    """The templates of one model.

    Args:
        source: Jinja source of the template; empty takes the one for tools, or ChatML.
        tool_source: Of the one that is used with tools; empty where the model has none of its own.
        options: What holds for requests that do not say.
    """

    def __init__(self, source: str, tool_source: str, vocab: Vocab, options: EngineOptions | None = None) -> None:
        self._vocab: Final = vocab
        self._options: Final = options or EngineOptions()
        self._default: Final = self._template(source or tool_source)
        self._for_tools: Final = self._template(tool_source) if tool_source else self._default
        #: Control tokens by their text, None for a text that is not one; filled as they are asked for.
        self._controls: Final[dict[str, int | None]] = {}

    def _template(self, source: str) -> ChatTemplate:
        vocab = self._vocab
        return ChatTemplate(
            source,
            bos=vocab.name(vocab.bos),
            eos=vocab.name(vocab.eos),
            adds_bos=vocab.adds_bos,
            adds_eos=vocab.adds_eos,
        )

    def prompt(self, messages: Messages, variables: Mapping[str, Any], options: ChatOptions | None) -> str:
        """Return the prompt of a conversation. Raises RequestError."""
        return self.turn(messages, variables, options).prompt

    def turn(self, messages: Messages, variables: Mapping[str, Any], options: ChatOptions | None) -> Turn:
        """Return the prompt of a conversation, and what reads the answer. Raises RequestError."""
        options = options or ChatOptions()
        template = self._for_tools if options.tools else self._default
        continuation = self._continuation(messages, options)
        variables = {
            "add_generation_prompt": options.add_generation_prompt,
            **self._options.template_kwargs,
            **variables,
        }
        calling = bool(options.tools) and options.tool_choice != "none"
        takes_tools = bool(options.tools) and template.traits.takes_tools
        if takes_tools:
            variables["tools"] = list(options.tools)
        parallel = options.parallel_tool_calls
        if calling and parallel is None:
            parallel = template.traits.takes_parallel_calls or not takes_tools
        if calling and not takes_tools:
            instruction = describe_tools(options.tools, choice=options.tool_choice, parallel=bool(parallel))
            messages = with_instruction(messages, instruction)
        tags = tags_of(template.source)
        if continuation:
            prompt, reasoning = _continued(template, messages, variables, tags, continuation)
        else:
            prompt, reasoning = template.render(messages, variables), None
        dialect = dialect_of(template.source, takes_tools=takes_tools) if calling else None
        opened = reasoning if reasoning is not None else tags is not None and tags.opened_by(prompt)
        # What continues content has its reasoning behind it.
        split = (
            None
            if (options.reasoning_format or self._options.reasoning_format) == "none" or reasoning is False
            else tags
        )
        controls = self._controls_of(tags, dialect)
        reply = None
        if dialect is not None or split is not None:
            reply = Reply(
                tags=split,
                opened=opened,
                continued=bool(reasoning),
                dialect=dialect,
                calls=_calls(options, dialect),
                kinds=kinds_of(options.tools),
                parallel=bool(parallel),
                silent=frozenset(controls),
            )
        return Turn(prompt, reply, frozenset(controls.values()))

    def _continuation(self, messages: Messages, options: ChatOptions) -> str:
        """Return which part of the last message is continued; empty for none."""
        if options.continuation != "prefill":
            return options.continuation
        if not self._options.prefill_assistant:
            return ""
        if len(messages) > 1 and messages[-2]["role"] == "assistant":
            raise RequestError("there cannot be two or more assistant messages at the end of the messages")
        return "auto"

    def _controls_of(self, tags: Tags | None, dialect: Dialect | None) -> dict[str, int]:
        """Return the control tokens among the texts that matter."""
        texts = (
            *((tags.start, tags.end) if tags is not None else ()),
            *(dialect.tokens if dialect is not None else ()),
        )
        for text in texts:
            if text not in self._controls:
                self._controls[text] = self._control(text)
        return {text: token for text in texts if (token := self._controls[text]) is not None}

    def _control(self, text: str) -> int | None:
        tokens = self._vocab.tokenize(text, add_special=False, parse_special=True)
        return tokens[0] if len(tokens) == 1 and not self._vocab.piece(tokens[0]) else None


def _calls(options: ChatOptions, dialect: Dialect | None) -> Calls | None:
    if dialect is None:
        return None
    names = [tool["function"]["name"] for tool in options.tools]
    return Calls([options.tool_name] if options.tool_name else names, dialect.new_id)


def _continued(
    template: ChatTemplate, messages: Messages, variables: Mapping[str, Any], tags: Tags | None, part: str
) -> tuple[str, bool]:
    """Return the prompt that ends within the last message, and whether it ends in its reasoning.

    As the reference does it: the turn is opened as for a new answer, what that opens of reasoning is replaced by the
    message's own, and its content follows.
    """
    *before, last = messages
    content, reasoning = text_of(last.get("content")), last.get("reasoning_content")
    reasoning = reasoning if isinstance(reasoning, str) else ""
    if last.get("tool_calls"):
        raise RequestError("an assistant message that contains tool calls cannot be continued")
    in_reasoning = part == "reasoning" or (part == "auto" and bool(reasoning) and not content)
    if in_reasoning and tags is None:
        raise RequestError("this model's chat template has no reasoning to continue")
    closed = template.render(before, {**variables, "add_generation_prompt": False}) if before else ""
    prompt = template.render(before, {**variables, "add_generation_prompt": True})
    if tags is not None:
        start, end = template.traits.reasoning_frame(tags.start, tags.end) or (
            f"{tags.start}\n",
            f"\n{tags.end}\n\n",
        )
        shared = _shared_length(closed, prompt)
        cut = prompt.find(tags.start, shared)
        prompt = (prompt[:cut] if cut >= 0 else prompt) + start + reasoning
        if not in_reasoning:
            prompt += end
    return prompt if in_reasoning else prompt + content, in_reasoning


def _shared_length(one: str, other: str) -> int:
    length = min(len(one), len(other))
    return next((index for index in range(length) if one[index] != other[index]), length)
