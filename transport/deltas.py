"""Several deltas of a request as one."""

from collections.abc import Iterable, Sequence

from llamaherd.transport.messages import CallDelta, Delta, TypedDelta

__all__ = ["join", "join_calls", "thinks", "typed"]


def join(deltas: Sequence[Delta]) -> Delta:
    """Return one delta that says what all of these say, which are of one request; there is at least one."""
    if len(deltas) == 1:
        return deltas[0]
    request = deltas[0].request
    text = "".join([delta.text for delta in deltas])
    tokens = tuple([token for delta in deltas for token in delta.tokens])
    probs = tuple([prob for delta in deltas for prob in delta.probs])
    more = [delta for delta in deltas if isinstance(delta, TypedDelta)]
    if not more:
        return Delta(request, text, tokens, probs)
    reasoning = "".join([delta.reasoning for delta in more])
    calls = join_calls(call for delta in more for call in delta.calls)
    # Counts and times are so far, so the last ones hold for all.
    usage = next((delta.usage for delta in reversed(more) if delta.usage is not None), None)
    timings = next((delta.timings for delta in reversed(more) if delta.timings is not None), None)
    return TypedDelta(request, text, tokens, probs, reasoning, calls, usage, timings)


def thinks(delta: Delta) -> bool:
    """Whether a delta brings reasoning and no text: its tokens are those that count as reasoning."""
    return isinstance(delta, TypedDelta) and bool(delta.reasoning) and not delta.text


def typed(delta: Delta) -> TypedDelta:
    """Return a delta as one of those that may bring more than text."""
    if isinstance(delta, TypedDelta):
        return delta
    return TypedDelta(delta.request, delta.text, delta.tokens, delta.probs)


def join_calls(deltas: Iterable[CallDelta]) -> tuple[CallDelta, ...]:
    """Return deltas of tool calls with those of the same call made one."""
    calls: dict[int, list[CallDelta]] = {}
    for delta in deltas:
        calls.setdefault(delta.index, []).append(delta)
    return tuple(
        CallDelta(index, "".join([part.arguments for part in parts]), parts[0].id, parts[0].name)
        for index, parts in sorted(calls.items())
    )
