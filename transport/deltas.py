"""Several deltas of a request as one."""

from collections.abc import Iterable, Sequence

from llamaherd.transport.messages import CallDelta, Delta, TypedDelta

__all__ = ["join", "join_calls"]


def join(deltas: Sequence[Delta]) -> Delta:
    """Return one delta that says what all of these say, which are of one request; there is at least one."""
    if len(deltas) == 1:
        return deltas[0]
    request = deltas[0].request
    text = "".join([delta.text for delta in deltas])
    tokens = tuple([token for delta in deltas for token in delta.tokens])
    probs = tuple([prob for delta in deltas for prob in delta.probs])
    typed = [delta for delta in deltas if isinstance(delta, TypedDelta)]
    if not typed:
        return Delta(request, text, tokens, probs)
    reasoning = "".join([delta.reasoning for delta in typed])
    return TypedDelta(
        request, text, tokens, probs, reasoning, join_calls(call for delta in typed for call in delta.calls)
    )


def join_calls(deltas: Iterable[CallDelta]) -> tuple[CallDelta, ...]:
    """Return deltas of tool calls with those of the same call made one."""
    calls: dict[int, list[CallDelta]] = {}
    for delta in deltas:
        calls.setdefault(delta.index, []).append(delta)
    return tuple(
        CallDelta(index, "".join([part.arguments for part in parts]), parts[0].id, parts[0].name)
        for index, parts in sorted(calls.items())
    )
