"""What callers say to restrict an answer's form, checked before a worker sees it."""

from typing import Final

from llamaherd.pool.errors import BadRequest
from llamaherd.pool.gbnf import MAX_SOURCE, GrammarError, parse

__all__ = ["check_grammar"]

#: Longest source that is read here too, for an early answer: some milliseconds. The worker reads all in any case.
_MOST_READ: Final = 4096


def check_grammar(grammar: object) -> str:
    """Return a GBNF source, empty for none, or raise :class:`~llamaherd.pool.errors.BadRequest`."""
    if grammar is None:
        return ""
    if not isinstance(grammar, str):
        raise BadRequest("grammar must be a text", code="invalid_grammar")
    if len(grammar) > MAX_SOURCE:
        raise BadRequest(f"grammar has {len(grammar)} characters, and at most {MAX_SOURCE} are allowed")
    if grammar and len(grammar) <= _MOST_READ:
        try:
            parse(grammar)
        except GrammarError as error:
            raise BadRequest(f"grammar: {error}", code="invalid_grammar") from None
    return grammar
