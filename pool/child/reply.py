"""What a model's answer says: content, reasoning and tool calls, told apart while it comes.

A :class:`Reply` is fed the text of one answer and tells what is certain. However the text is cut, the parts are the
same in the end; what only looks like a call is content; and of everything the model wrote, only marks, and white space
next to them, are not told. Of a mark that the answer's end has torn, that is so where a call ends with it; and what was
cut at its limit within the beginning of a call, before anything can be told of that, is not told either.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

from llamaherd.pool.child.call_form import Form, begins_as
from llamaherd.pool.child.calls import Calls
from llamaherd.pool.child.calls_tagged import Kinds
from llamaherd.pool.child.dialect import Dialect
from llamaherd.pool.child.scan import Reading, Scan, overlap
from llamaherd.pool.child.thinking import Tags
from llamaherd.transport.messages import CallDelta, Delta, FinishReason, PromptProgress, Tokens, TypedDelta

__all__ = ["Parts", "Reply", "read_delta", "sorted_tokens"]


class Parts(NamedTuple):
    """What became certain: content, reasoning, tool calls."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()


class _Prose:
    """A text whose outer white space does not count: it is held until something follows it."""

    def __init__(self, *, keep_lead: bool) -> None:
        self._parts: list[str] = []
        self._held: str = ""
        self._keep_lead = keep_lead
        self.begun = False

    def add(self, text: str) -> None:
        if not self.begun and not self._keep_lead:
            text = text.lstrip()
        text = self._held + text
        body = text.rstrip()
        self._held = text[len(body) :]
        if body:
            self.begun = True
            self._parts.append(body)

    def drop_lead(self) -> None:
        """Forget white space that nothing has come before."""
        if not self.begun:
            self._held = ""
            self._keep_lead = False

    def end(self) -> None:
        """Tell the white space that was held."""
        self._parts.append(self._held)
        self._held = ""

    def take(self) -> str:
        text = "".join(self._parts)
        self._parts.clear()
        return text


class Reply:
    """One answer being read.

    Args:
        tags: Tags of the reasoning that is told apart; None leaves it in the content.
        opened: Whether the prompt has opened the reasoning already.
        continued: Whether it has begun it too, so that white space at the head counts.
        dialect: How calls are written; None reads none.
        calls: The functions that may be called.
        parallel: Whether there may be more than one call; otherwise the first one ends the answer.
        silent: Marks that are control tokens here: unlike others, they are no content when they begin no call.
        forms: How an answer begins that is calls, where any other one is content as it stands: JSON may hold in its
            texts what looks like a call. Empty where there may be text before calls.
    """

    def __init__(
        self,
        *,
        tags: Tags | None = None,
        opened: bool = False,
        continued: bool = False,
        dialect: Dialect | None = None,
        calls: Calls | None = None,
        kinds: Kinds | None = None,
        parallel: bool = True,
        silent: frozenset[str] = frozenset(),
        forms: Sequence[Form] = (),
    ) -> None:
        self._scan: Final = Scan()
        self._tags: Final = tags
        self._opened: Final = opened
        self._dialect: Final = dialect
        self._calls: Final = calls or Calls(())
        self._kinds: Final = kinds or {}
        self._parallel: Final = parallel
        self._silent: Final = silent
        self._forms: Final = forms
        self._openings: Final = dialect.openings if dialect is not None else ()
        self._content: Final = _Prose(keep_lead=True)
        self._reasoning: Final = _Prose(keep_lead=continued)
        self._line_is_blank = True
        #: Whether nothing more may follow: the one call that was allowed is there.
        self.full = False
        self._cut = False
        self._reader: Reading[None] | None = self._read()
        self._resume()

    @property
    def called(self) -> bool:
        """Whether a tool call has begun."""
        return self._calls.begun > 0

    def feed(self, text: str) -> Parts:
        """Take more text; return what is certain now."""
        self._scan.feed(text)
        self._resume()
        return self._take()

    def finish(self, *, cut: bool = False) -> Parts:
        """End the text; return what was held back. Whether it was ``cut`` decides on the beginning of a call."""
        self._scan.ended = True
        self._cut = cut
        self._resume()
        if not self.called and (self._content.begun or not self._reasoning.begun):
            self._content.end()
        return self._take()

    def _resume(self) -> None:
        if self._reader is not None and next(self._reader, self) is self:
            self._reader = None

    def _take(self) -> Parts:
        return Parts(self._content.take(), self._reasoning.take(), self._calls.take())

    # --- the grammar of an answer ---

    def _read(self) -> Reading[None]:
        if self._tags is not None:
            yield from self._think(self._tags)
        if self._forms and not (yield from self._is_calls()):
            yield from self._tell_all()
            return
        while True:
            mark = yield from self._until_mark()
            if not mark:
                return
            if self._dialect is None or mark in self._dialect.noise:
                self._scan.skip(len(mark))
                self._scan.settle()
                continue
            begun, self._scan.short = self._calls.begun, False
            yield from self._dialect.read(mark, self._scan, self._calls, self._kinds)
            self._scan.rewind()
            if self._calls.begun == begun and self._cut and self._scan.short and _says_call(mark):
                return
            if self._calls.begun == begun:
                self._scan.skip(len(mark))
                if mark not in self._silent:
                    self._tell(mark)
                self._scan.settle()
            elif not self._parallel and self._calls.ended:
                self.full = True
                return
            else:
                self._line_is_blank = True

    def _think(self, tags: Tags) -> Reading[None]:
        scan = self._scan
        yield from scan.blank()
        if (yield from scan.literal(tags.start)):  # some models write it although the prompt has it
            scan.settle()
        elif self._opened:
            scan.rewind()
        else:
            scan.rewind()
            return
        if (yield from scan.until(tags.end, self._reasoning.add)) is not None:
            self._content.drop_lead()

    def _is_calls(self) -> Reading[bool]:
        """Whether an answer that is either calls or content is calls; True where it ends before that is known."""
        while (found := begins_as(self._scan.rest, self._forms)) is None and not self._scan.ended:
            yield
        return found is not False

    def _tell_all(self) -> Reading[None]:
        scan = self._scan
        while True:
            text = scan.rest
            self._tell(text)
            scan.skip(len(text))
            scan.settle()
            if scan.ended:
                return
            yield

    def _until_mark(self) -> Reading[str]:
        """Tell content up to the next mark, which stays unread; return the mark, empty at the end."""
        scan, openings = self._scan, self._openings
        while True:
            text = scan.rest
            at, mark = self._first_mark(text)
            if not mark:
                at = len(text)
                if not scan.ended and openings:
                    at -= max(overlap(text, opening, 0) for opening in openings)
            elif not scan.ended and any(_begins(opening, text[at:]) for opening in openings):
                mark = ""  # which of two it is, the next characters say
            if at:
                self._tell(text[:at])
                scan.skip(at)
                scan.settle()
            if mark or scan.ended:
                return mark
            yield

    def _first_mark(self, text: str) -> tuple[int, str]:
        best, found = len(text), ""
        for opening in self._openings:
            at = text.find(opening)
            while 0 <= at < best:
                if len(opening) > 1 or self._begins_line(text, at):
                    best, found = at, opening
                    break
                at = text.find(opening, at + 1)
        return best, found

    def _begins_line(self, text: str, at: int) -> bool:
        line = text[text.rfind("\n", 0, at) + 1 : at]
        return not line.strip() and (self._line_is_blank or "\n" in text[:at])

    def _tell(self, text: str) -> None:
        self._content.add(text)
        line = text.rpartition("\n")
        self._line_is_blank = not line[2].strip() and (self._line_is_blank or bool(line[1]))


def read_delta(reply: Reply, delta: Delta, reason: FinishReason | None) -> tuple[Delta, FinishReason | None]:
    """Return a step's delta with its text taken apart, and why the answer ends with it, if it does."""
    parts = reply.feed(delta.text)
    if reply.full:
        reason = "stop"
    if reason is not None:
        last = reply.finish(cut=reason == "length")
        parts = Parts(parts.text + last.text, parts.reasoning + last.reasoning, (*parts.calls, *last.calls))
    if reason == "stop" and reply.called:
        reason = "tool_calls"
    if parts.reasoning or parts.calls:
        return TypedDelta(delta.request, parts.text, delta.tokens, delta.probs, parts.reasoning, parts.calls), reason
    return Delta(delta.request, parts.text, delta.tokens, delta.probs), reason


def sorted_tokens(deltas: list[Delta], progress: tuple[PromptProgress, ...] = ()) -> Tokens:
    """Return the message of one step."""
    for delta in deltas:  # every step comes through here, and most find nothing
        if type(delta) is TypedDelta:
            break
    else:
        return Tokens(deltas=tuple(deltas), progress=progress)
    typed = tuple(delta for delta in deltas if isinstance(delta, TypedDelta))
    plain = tuple(delta for delta in deltas if not isinstance(delta, TypedDelta))
    return Tokens(deltas=plain, typed=typed, progress=progress)


def _says_call(mark: str) -> bool:
    """Whether a mark begins calls and nothing else: a bracket or a fence may as well begin an answer in JSON."""
    return len(mark) > 1 and mark.startswith(("<", "["))


def _begins(whole: str, text: str) -> bool:
    return len(whole) > len(text) and whole.startswith(text)
