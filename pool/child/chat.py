"""One model's conversations: which template renders one, and how what the model answers is to be read."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from llamaherd.pool.child.budget import Budget
from llamaherd.pool.child.call_form import forms_of
from llamaherd.pool.child.calls import Calls
from llamaherd.pool.child.calls_tagged import kinds_of
from llamaherd.pool.child.conversation import describe_tools, text_of, with_instruction
from llamaherd.pool.child.dialect import Dialect, dialect_of
from llamaherd.pool.child.engine import RequestError
from llamaherd.pool.child.harmony import (
    ANALYSIS,
    ANALYSIS_END,
    FINAL,
    HARMONY,
    HarmonyReply,
    is_harmony,
    opened_message,
)
from llamaherd.pool.child.reply import Reply
from llamaherd.pool.child.template import ChatTemplate
from llamaherd.pool.child.thinking import Tags, tags_of
from llamaherd.pool.child.tool_grammar import ToolGrammar, tool_grammar
from llamaherd.pool.child.vocab import Vocab
from llamaherd.transport.messages import ChatOptions, EngineOptions

__all__ = ["Chats", "Turn"]

Messages = Sequence[Mapping[str, Any]]


#: Most tools whose form is enforced. A grammar of so many takes about 100 ms to compile, and the others wait.
_MOST_ENFORCED: Final = 256


class Turn(NamedTuple):
    """What a chat request comes to.

    Attributes:
        prompt: The conversation as text.
        reply: Reads the answer; None where the answer is content and nothing else.
        shown: Control tokens whose text is part of the answer.
        closing: What must be said before the content begins, where the prompt has opened something else; else empty.
        begun: The content that the prompt ends with, where the answer goes on with it; else empty.
        grammar: What its tool calls must be like, or all of it where there is a schema too; None where there may be no
            calls, or nobody knows.
        budget: How much it may think; None sets no limit.
    """

    prompt: str
    reply: Reply | None = None
    shown: frozenset[int] = frozenset()
    closing: str = ""
    begun: str = ""
    grammar: ToolGrammar | None = None
    budget: Budget | None = None


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

    def prepare(self) -> None:
        """Compile the template that most requests use. What is wrong with it, the first request will be told."""
        self._default.prepare()

    def prompt(self, messages: Messages, variables: Mapping[str, Any], options: ChatOptions | None) -> str:
        """Return the prompt of a conversation. Raises RequestError."""
        return self.turn(messages, variables, options).prompt

    def turn(
        self, messages: Messages, variables: Mapping[str, Any], options: ChatOptions | None, schema: str = ""
    ) -> Turn:
        """Return the prompt of a conversation, and what reads the answer. Raises RequestError.

        Args:
            schema: JSON Schema that an answer must follow which calls no tools; empty for none.
        """
        try:
            return self._turn(messages, variables, self._plan(options or ChatOptions(), schema))
        except RecursionError:
            raise RequestError("the messages or tools are nested too deep") from None

    def _turn(self, messages: Messages, variables: Mapping[str, Any], plan: "_Plan") -> Turn:
        template, options = plan.template, plan.options
        variables = {
            "add_generation_prompt": options.add_generation_prompt,
            **self._options.template_kwargs,
            **variables,
        }
        if plan.takes_tools:
            variables["tools"] = list(options.tools)
        elif plan.calling:
            choice = "schema" if plan.schema else options.tool_choice
            instruction = describe_tools(options.tools, choice=choice, parallel=plan.parallel)
            messages = with_instruction(messages, instruction)
        continuation = self._continuation(messages, options)
        part = ""
        if continuation:
            prompt, part = _continued(template, messages, variables, plan.tags, continuation)
        else:
            prompt = template.render(messages, variables)
        controls = self._controls_of(plan.tags, plan.dialect)
        reply = _reply(plan, prompt, part, frozenset(controls))
        noise = plan.dialect.noise if plan.dialect is not None else ()
        shown = frozenset(token for text, token in controls.items() if text not in noise)
        closing, grammar = _closing(plan, prompt, part), _grammar(plan, prompt, part, controls)
        begun = text_of(messages[-1].get("content")) if part == "content" else ""
        return Turn(prompt, reply, shown, closing, begun, grammar, self._budget(plan, prompt, part, controls))

    def _plan(self, options: ChatOptions, schema: str) -> "_Plan":
        template = self._for_tools if options.tools else self._default
        calling = bool(options.tools) and options.tool_choice != "none"
        takes_tools = bool(options.tools) and template.traits.takes_tools
        parallel = options.parallel_tool_calls
        if calling and parallel is None:
            parallel = template.traits.takes_parallel_calls or not takes_tools
        dialect = None
        if is_harmony(template.source):
            dialect = HARMONY
        elif calling:
            dialect = dialect_of(template.source, takes_tools=takes_tools)
        return _Plan(
            template=template,
            options=options,
            calling=calling,
            takes_tools=takes_tools,
            parallel=bool(parallel),
            dialect=dialect,
            tags=tags_of(template.source),
            split=(options.reasoning_format or self._options.reasoning_format) != "none",
            schema=schema if calling and options.tool_choice == "auto" else "",
        )

    def _continuation(self, messages: Messages, options: ChatOptions) -> str:
        """Return which part of the last message is continued; empty for none."""
        if options.continuation != "prefill":
            return options.continuation
        if not self._options.prefill_assistant:
            return ""
        if len(messages) > 1 and messages[-2]["role"] == "assistant":
            raise RequestError("there cannot be two or more assistant messages at the end of the messages")
        return "auto"

    def _budget(self, plan: "_Plan", prompt: str, part: str, controls: Mapping[str, int]) -> Budget | None:
        """Return how much an answer may think; None where nothing limits it or nobody knows how it would end."""
        asked, given = plan.options, self._options
        limit = asked.reasoning_budget if asked.reasoning_budget >= 0 else given.reasoning_budget
        message = asked.reasoning_budget_message
        message = given.reasoning_budget_message if message is None else message
        if limit < 0 or part == "content":
            return None
        if plan.dialect is HARMONY:
            if plan.calling:
                return None  # what follows would be the model's to choose, and it may choose to think on
            ends, closing = (ANALYSIS, ANALYSIS_END), f"{message}{ANALYSIS_END}{FINAL}"
            return Budget(tokens=limit, start=ends[0], end=ends[1], closing=closing, opened=part == "reasoning")
        tags = plan.tags
        if tags is None:
            return None
        return Budget(
            tokens=limit,
            start=tags.start,
            end=tags.end,
            closing=message + tags.end,
            opened=part == "reasoning" or tags.opened_by(prompt),
            anywhere=tags.start in controls,
        )

    def _controls_of(self, tags: Tags | None, dialect: Dialect | None) -> dict[str, int]:
        """Return the control tokens among the texts that matter."""
        texts = (
            *((tags.start, tags.end) if tags is not None else ()),
            *((*dialect.tokens, *dialect.noise) if dialect is not None else ()),
        )
        for text in texts:
            if text not in self._controls:
                self._controls[text] = self._control(text)
        return {text: token for text in texts if (token := self._controls[text]) is not None}

    def _control(self, text: str) -> int | None:
        tokens = self._vocab.tokenize(text, add_special=False, parse_special=True)
        return tokens[0] if len(tokens) == 1 and not self._vocab.piece(tokens[0]) else None


class _Plan(NamedTuple):
    """What a request comes to before its messages are looked at.

    Attributes:
        calling: Whether the answer may hold calls.
        takes_tools: Whether the template tells of the tools.
        split: Whether reasoning is told apart.
        schema: What an answer must be like that may be calls and is none; empty where it may be any text.
    """

    template: ChatTemplate
    options: ChatOptions
    calling: bool
    takes_tools: bool
    parallel: bool
    dialect: Dialect | None
    tags: Tags | None
    split: bool
    schema: str

    @property
    def names(self) -> list[str]:
        """The functions that may be called."""
        if not self.calling:
            return []
        return list(self.options.tool_names) or [tool["function"]["name"] for tool in self.options.tools]


def _closing(plan: _Plan, prompt: str, part: str) -> str:
    """Return what comes between the end of a prompt and the content; empty where the content begins at once."""
    if part == "content":
        return ""
    if plan.dialect is HARMONY:
        return "final<|message|>"
    opened = part == "reasoning" or (plan.tags is not None and plan.tags.opened_by(prompt))
    return plan.tags.end if opened and plan.tags is not None else ""


def _reply(plan: _Plan, prompt: str, part: str, silent: frozenset[str]) -> Reply | None:
    """Return what reads the answer to a prompt that continues a part of a message, or none; None for plain content."""
    dialect = plan.dialect
    calls = Calls(plan.names, dialect.new_id) if dialect is not None else None
    if dialect is HARMONY:
        within = {"reasoning": "analysis", "content": "final"}.get(part, "")
        return HarmonyReply(
            split=plan.split, within=within, continued=part == "reasoning", calls=calls, parallel=plan.parallel
        )
    # What continues content has its reasoning behind it.
    tags = plan.tags if plan.split and part != "content" else None
    if plan.schema and part == "content":
        dialect = None
    if dialect is None and tags is None:
        return None
    return Reply(
        tags=tags,
        opened=part == "reasoning" or (tags is not None and tags.opened_by(prompt)),
        continued=part == "reasoning",
        dialect=dialect,
        calls=calls,
        kinds=kinds_of(plan.options.tools),
        parallel=plan.parallel,
        silent=silent,
        # Reasoning that stays in the content comes before both.
        forms=forms_of(dialect, plan.names) if dialect is not None and plan.schema and tags == plan.tags else (),
    )


def _grammar(plan: _Plan, prompt: str, part: str, controls: Mapping[str, int]) -> ToolGrammar | None:
    """Return what holds an answer to calls, or its calls to their form; nothing does where it goes on in a message,
    unless there is a schema and it goes on in the reasoning.
    """
    if plan.dialect is None or not plan.calling or (part and not (plan.schema and part == "reasoning")):
        return None
    required, tags = plan.options.tool_choice == "required", plan.tags
    if tags is not None and (plan.dialect is HARMONY or (not part and prompt.rstrip().endswith(tags.end))):
        tags = None
    names = plan.names
    if len(names) > _MOST_ENFORCED:
        if required or plan.schema:
            wanted = "a call can be required" if required else "with a schema an answer can be a call"
            raise RequestError(f"{wanted} of at most {_MOST_ENFORCED} tools, and {len(names)} are given")
        return None
    return tool_grammar(
        plan.dialect,
        plan.template.source,
        [tool for tool in plan.options.tools if tool["function"]["name"] in names],
        required=required,
        parallel=plan.parallel,
        controls=controls,
        tags=tags,
        opened=part == "reasoning" or (tags is not None and tags.opened_by(prompt)),
        schema=plan.schema,
    )


def _continued(
    template: ChatTemplate, messages: Messages, variables: Mapping[str, Any], tags: Tags | None, part: str
) -> tuple[str, str]:
    """Return the prompt that ends within the last message, and in which part of it.

    As the reference does it: the turn is opened as for a new answer, what that opens of reasoning is replaced by the
    message's own, and its content follows.
    """
    *before, last = messages
    content, reasoning = text_of(last.get("content")), last.get("reasoning_content")
    reasoning = reasoning if isinstance(reasoning, str) else ""
    harmony = is_harmony(template.source)
    if last.get("tool_calls"):
        raise RequestError("an assistant message that contains tool calls cannot be continued")
    if part == "auto":
        part = "reasoning" if reasoning and not content else "content"
    if part == "reasoning" and tags is None and not harmony:
        raise RequestError("this model's chat template has no reasoning to continue")
    closed = template.render(before, {**variables, "add_generation_prompt": False}) if before else ""
    if harmony:
        return closed + opened_message(reasoning, content if part == "content" else None), part
    prompt = template.render(before, {**variables, "add_generation_prompt": True})
    if tags is not None:
        start, end = template.traits.reasoning_frame(tags.start, tags.end) or (
            f"{tags.start}\n",
            f"\n{tags.end}\n\n",
        )
        cut = prompt.find(tags.start, _shared_length(closed, prompt))
        prompt = (prompt[:cut] if cut >= 0 else prompt) + start + reasoning
        if part == "content":
            prompt += end
    return prompt + content if part == "content" else prompt, part


def _shared_length(one: str, other: str) -> int:
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
