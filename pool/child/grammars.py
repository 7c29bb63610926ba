"""The grammars of one loaded model: compiled when a request brings them, and kept for further ones."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from llamaherd.pool.child.constraint import Alphabet, Constraint, ConstraintError
from llamaherd.pool.child.either import EitherConstraint
from llamaherd.pool.child.engine import RequestError
from llamaherd.pool.child.lazy import LazyConstraint
from llamaherd.pool.child.matcher import Automaton, Matcher
from llamaherd.pool.child.tool_grammar import ToolGrammar
from llamaherd.pool.child.vocab import Vocab
from llamaherd.pool.gbnf import GrammarError, Rules, TokenRef, parse
from llamaherd.transport.messages import Generate, GrammarTrigger

if TYPE_CHECKING:
    from llamaherd.pool.child.json_grammar import JsonGrammars

__all__ = ["Grammars"]

#: Automata that are kept; each may take some 10 MB.
_MOST_KEPT: Final = 8
_MOST_WORDS: Final = 64
_LONGEST_WORD: Final = 256
_OPENING: Final = re.compile(r"[{\[]")


class Grammars:
    """Makes the constraints of requests."""

    def __init__(self, vocab: Vocab) -> None:
        self._vocab: Final = vocab
        self._alphabet: Final = Alphabet(vocab)
        self._automata: Final[dict[str, Automaton]] = {}
        self._schemas: JsonGrammars | None = None

    def make(self, request: Generate, closing: str = "", begun: str = "") -> Constraint | None:
        """Return the constraint that a request asks for, None for none. Raises RequestError.

        Args:
            closing: What ends the reasoning that the prompt has begun: before that a grammar does not hold.
            begun: The beginning of the answer that the prompt ends with. A schema is of the whole answer, a grammar of
                what comes, as in the reference.
        """
        constraint: Constraint
        if request.grammar and request.json_schema:
            raise RequestError("grammar and json_schema cannot both be given", code="invalid_grammar")
        if request.json_schema:
            constraint = self._follow(lambda schemas: schemas.make(request.json_schema))
            if begun and request.trigger is None:
                constraint = _after(constraint, begun)
        elif request.grammar:
            constraint = Matcher(self._automaton(request.grammar))
        else:
            return None
        trigger = request.trigger or (GrammarTrigger(after=(closing,)) if closing else None)
        if trigger is None:
            return constraint
        words = (*trigger.words, *trigger.leading, *trigger.after)
        if not words or len(words) > _MOST_WORDS or not all(0 < len(word) <= _LONGEST_WORD for word in words):
            raise RequestError(
                f"a grammar's trigger needs 1 to {_MOST_WORDS} words of 1 to {_LONGEST_WORD} characters",
                code="invalid_grammar",
            )
        return LazyConstraint(constraint, trigger, self._vocab)

    def make_calls(self, grammar: ToolGrammar) -> Constraint:
        """Return the constraint of an answer that calls tools, or may do so. Raises RequestError. A schema that it may
        follow instead is part of the grammar.
        """
        constraint: Constraint = self._follow(lambda schemas: schemas.make_calls(grammar.source, grammar.subject))
        if grammar.alike is not None:
            source, forms, tags, opened = grammar.alike
            calls = self._follow(lambda schemas: schemas.make_calls(source, grammar.subject))
            return EitherConstraint(constraint, calls, self._vocab, forms=forms, tags=tags, opened=opened)
        if grammar.waits:
            trigger = GrammarTrigger(words=grammar.words, leading=grammar.leading)
            constraint = LazyConstraint(constraint, trigger, self._vocab)
        if grammar.after:
            constraint = LazyConstraint(constraint, GrammarTrigger(after=(grammar.after,)), self._vocab)
        return constraint

    def _follow(self, make: Callable[["JsonGrammars"], Constraint]) -> Constraint:
        try:
            if self._schemas is None:
                from llamaherd.pool.child.json_grammar import JsonGrammars  # here: few workers ever need it

                self._schemas = JsonGrammars(self._vocab)
            return make(self._schemas)
        except ConstraintError as error:
            raise RequestError(str(error), code=error.code) from None

    def _automaton(self, source: str) -> Automaton:
        automaton = self._automata.pop(source, None)
        if automaton is None:
            try:
                rules = parse(source)
                self._check_tokens(rules)
                automaton = Automaton(rules, self._alphabet, self._token)
            except GrammarError as error:
                raise RequestError(f"grammar: {error}", code="invalid_grammar") from None
            except ConstraintError as error:
                raise RequestError(str(error), code=error.code) from None
        self._automata[source] = automaton
        if len(self._automata) > _MOST_KEPT:
            del self._automata[next(iter(self._automata))]
        return automaton

    def _check_tokens(self, rules: Rules) -> None:
        elements = (element for rule in rules.rules for sequence in rule for element in sequence)
        ids = (element.token for element in elements if isinstance(element, TokenRef))
        largest = max((token for token in ids if isinstance(token, int)), default=0)
        if largest >= self._vocab.size:
            raise GrammarError(f"token {largest} is not in the vocabulary of {self._vocab.size} tokens")

    def _token(self, text: str) -> int:
        tokens = self._vocab.tokenize(text, add_special=False, parse_special=True)
        if len(tokens) != 1:
            raise GrammarError(f"{text!r} is {len(tokens)} tokens of this model, and must be one")
        return tokens[0]


def _after(constraint: Constraint, begun: str) -> Constraint:
    """Return a schema's constraint behind the beginning of its answer. Words may stand before the JSON, or alone: then
    it is still to come.

    Raises:
        RequestError: what has begun is JSON, and not of this schema.
    """
    text = begun.lstrip()
    opening = _OPENING.search(text)
    for part in dict.fromkeys((text, text[opening.start() :] if opening is not None else text)):
        after = constraint.copy()
        if after.feed(part.encode()):
            return after
    if text.startswith(("{", "[", '"')):
        raise RequestError("the message to continue does not begin as the schema demands", code="invalid_json_schema")
    return constraint
