"""The matcher of GBNF grammars: which tokens may come next, in bounded time and memory.

llama.cpp's own keeps every possible stack of rules apart, and follows each for every token of the vocabulary: a grammar
as short as ``("a"?){300} "x"`` keeps it busy for minutes, and a forbidden token that it is told to accept ends the
process. Here the stacks that differ only below share what is below (a graph-structured stack), so the work for one
character is bounded by the size of the grammar times the depth of what is open.

A *state* is what a text leads to: the elements that may come next, each with the node of its open rules. Equal ones are
one object, and each remembers where its characters lead. In the loops that generation spends its time in, a character
costs one look-up; the rest is made as it is needed (a lazily built automaton).
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from llamaherd.pool.child.constraint import Alphabet, Choice, ConstraintError, Text, decode
from llamaherd.pool.gbnf import Chars, Element, Ref, Rules, TokenRef

__all__ = ["Automaton", "GrammarState", "Matcher"]

#: Most places that are looked at for one character, and for one token chosen: some 10 and 200 ms.
_MOST_FOR_CHAR: Final = 20_000
_MOST_FOR_TOKEN: Final = 400_000
#: What is kept of one grammar, in places and look-ups of about 100 bytes; beyond that all is forgotten and made anew.
_MOST_KEPT: Final = 200_000


class Node:
    """The rules that are open: where each way to come here goes on, and in which node."""

    __slots__ = ("returns",)

    def __init__(self, returns: "frozenset[Place]") -> None:
        self.returns: Final = returns


#: An index into the elements, and the node that is open there.
Place: TypeAlias = tuple[int, Node]
#: Within one step the node of a rule that is entered in it is not known yet: the rule stands for it.
_Open: TypeAlias = Node | int

_ROOT: Final = Node(frozenset())


class GrammarState:
    """See the module's text.

    Attributes:
        places: The characters and tokens that may come next.
        ends: Whether the text may end here.
        after: Where characters lead, None for nowhere; filled as they are asked for.
    """

    __slots__ = ("after", "ends", "places")

    def __init__(self, places: tuple[Place, ...], ends: bool) -> None:
        self.places: Final = places
        self.ends: Final = ends
        self.after: dict[int, GrammarState | None] = {}


class _At(NamedTuple):
    """A state between two tokens: the bits of a character that is not complete, and how many bytes it needs."""

    state: GrammarState
    value: int = 0
    missing: int = 0


class Automaton:
    """A compiled grammar, shared by all sequences that use it.

    Args:
        token: Returns the id of a token by its text. Raises what the caller shall see.
    """

    def __init__(self, grammar: Rules, alphabet: Alphabet, token: Callable[[str], int]) -> None:
        self.alphabet: Final = alphabet
        self._nullable: Final = grammar.nullable
        #: The alternatives of each rule, by their first index.
        self._starts: Final[list[list[int]]] = []
        #: Elements one after the other; None ends an alternative.
        self._elements: Final[list[Element | None]] = []
        for rule in grammar.rules:
            starts: list[int] = []
            for sequence in rule:
                starts.append(len(self._elements))
                self._elements.extend(_resolved(element, token) for element in sequence)
                self._elements.append(None)
            self._starts.append(starts)
        self._root: Final = grammar.root
        self._nodes: Final[dict[frozenset[Place], Node]] = {}
        self._states: Final[dict[tuple[frozenset[Place], bool], GrammarState]] = {}
        self._steps: Final[dict[tuple[Place, ...], GrammarState]] = {}
        self._n_kept = 0
        self.budget = _MOST_FOR_TOKEN
        self.start: Final = _At(self._step(tuple((start, _ROOT) for start in self._starts[self._root])))

    # --- one character ---

    def after(self, state: GrammarState, char: int) -> GrammarState | None:
        """Return the state behind a character, None if it may not come."""
        self._spend(len(state.places))
        self._n_kept += 1
        seeds = tuple((index + 1, node) for index, node in state.places if self._takes(index, char))
        result = state.after[char] = self._step(seeds) if seeds else None
        return result

    def _takes(self, index: int, char: int) -> bool:
        element = self._elements[index]
        if not isinstance(element, Chars):
            return False
        ranges = element.ranges
        at = bisect_right(ranges, (char, 0x110000)) - 1
        return at >= 0 and char <= ranges[at][1]

    def _begins(self, state: GrammarState, value: int, missing: int) -> bool:
        """Whether some character that begins with these bits may come."""
        low = value << 6 * missing
        high = low | (1 << 6 * missing) - 1
        if low == 0:
            low = 0x800 if missing == 2 else 0x10000
        for index, _ in state.places:
            element = self._elements[index]
            if isinstance(element, Chars) and any(first <= high and low <= last for first, last in element.ranges):
                return True
        return False

    # --- one token ---

    def advance(self, at: _At, token: int) -> _At | None:
        """Return where a token leads that ends no generation, None if it may not come."""
        if at.missing:
            piece = self.alphabet.vocab.piece(token)
            return self.advance_bytes(at, piece) if piece else None
        text = self.alphabet.text(token)
        by_chars = self._advance_chars(at.state, text) if text is not None else None
        by_token = self._by_token(at.state, token)
        if by_token is None:
            return by_chars
        if by_chars is None or by_chars.missing:
            return _At(by_token)
        both = frozenset((*by_chars.state.places, *by_token.places))
        return _At(self._state(both, by_chars.state.ends or by_token.ends))

    def advance_bytes(self, at: _At, data: bytes) -> _At | None:
        """Return where a text leads, None if it may not come."""
        text = decode(data, at.value, at.missing)
        return None if text is None else self._advance_chars(at.state, text)

    def allows_end(self, at: _At, token: int) -> bool:
        """Whether a token may come that ends the generation: where the text may end, or the grammar names it."""
        named = any(self._elements[index] == TokenRef(token, False) for index, _ in at.state.places)
        return not at.missing and (at.state.ends or named)

    def _advance_chars(self, state: GrammarState, text: Text) -> _At | None:
        for char in text.chars:
            after = state.after
            following = after[char] if char in after else self.after(state, char)
            if following is None:
                return None
            state = following
        if text.missing and not self._begins(state, text.value, text.missing):
            return None
        return _At(state, text.value, text.missing)

    def _by_token(self, state: GrammarState, token: int) -> GrammarState | None:
        seeds: list[Place] = []
        for index, node in state.places:
            element = self._elements[index]
            if isinstance(element, TokenRef) and (element.token == token) != element.negated:
                seeds.append((index + 1, node))
        return self._step(tuple(seeds)) if seeds else None

    def firsts(self, state: GrammarState) -> npt.NDArray[np.int64]:
        """Return the tokens that may come next by their first character, or may for what else is known."""
        first = self.alphabet.first
        wanted = first == -1
        for index, _ in state.places:
            element = self._elements[index]
            if not isinstance(element, Chars):
                return np.arange(len(first))
            if len(element.ranges) > 50:
                return np.arange(len(first))
            for low, high in element.ranges:
                wanted |= (first >= low) & (first <= high)
        return np.flatnonzero(wanted)

    # --- states ---

    def _step(self, seeds: tuple[Place, ...]) -> GrammarState:
        """Return the state of these places, which need not be characters yet."""
        known = self._steps.get(seeds)
        if known is not None:
            return known
        self._forget_if_many()
        places, entered, ends = self._closure(seeds)
        nodes = self._resolve(places, entered)
        found = frozenset((index, nodes[open_] if isinstance(open_, int) else open_) for index, open_ in places)
        state = self._steps[seeds] = self._state(found, ends)
        self._n_kept += len(seeds)
        return state

    def _closure(
        self, seeds: tuple[Place, ...]
    ) -> tuple[list[tuple[int, _Open]], dict[int, set[tuple[int, _Open]]], bool]:
        """Follow rules until characters or tokens come.

        Returns those, where each rule that was entered goes on behind it, and whether the text may end here. A rule
        that is the last of its sequence is not entered, but takes the sequence's place: loops do not grow.
        """
        places: list[tuple[int, _Open]] = []
        entered: dict[int, set[tuple[int, _Open]]] = {}
        ends = False
        todo: list[tuple[int, _Open]] = list(seeds)
        seen: set[tuple[int, _Open]] = set(seeds)

        def visit(place: tuple[int, _Open]) -> None:
            if place not in seen:
                seen.add(place)
                todo.append(place)

        while todo:
            index, open_ = todo.pop()
            element = self._elements[index]
            if element is None:
                if open_ is _ROOT:
                    ends = True
                elif isinstance(open_, Node):
                    for place in open_.returns:
                        visit(place)
                # Else nothing was matched since its rule was entered, and that was seen to where it was.
            elif isinstance(element, Ref):
                rule = element.rule
                inside: _Open = open_
                if self._elements[index + 1] is not None:
                    inside = rule
                    entered.setdefault(rule, set()).add((index + 1, open_))
                for start in self._starts[rule]:
                    visit((start, inside))
                if self._nullable[rule]:
                    visit((index + 1, open_))
            else:
                places.append((index, open_))
            if len(seen) > _MOST_FOR_CHAR:
                raise _too_complex()
        self._spend(len(seen))
        return places, entered, ends

    def _resolve(self, places: list[tuple[int, _Open]], entered: dict[int, set[tuple[int, _Open]]]) -> dict[int, Node]:
        """Return the node of every entered rule that is still open. They do not form a circle: a grammar in which they
        could is left-recursive, and was refused.
        """
        nodes: dict[int, Node] = {}
        todo = [open_ for _, open_ in places if isinstance(open_, int)]
        while todo:
            rule = todo[-1]
            if rule in nodes:
                todo.pop()
                continue
            missing = [open_ for _, open_ in entered[rule] if isinstance(open_, int) and open_ not in nodes]
            if missing:
                todo += missing
                continue
            todo.pop()
            returns = frozenset(
                (index, nodes[open_] if isinstance(open_, int) else open_) for index, open_ in entered[rule]
            )
            node = self._nodes.get(returns)
            if node is None:
                node = self._nodes[returns] = Node(returns)
                self._n_kept += len(returns)
            nodes[rule] = node
        return nodes

    def _state(self, places: frozenset[Place], ends: bool) -> GrammarState:
        state = self._states.get((places, ends))
        if state is None:
            state = self._states[places, ends] = GrammarState(tuple(places), ends)
            self._n_kept += len(places)
        return state

    def _spend(self, visited: int) -> None:
        self.budget -= visited
        if self.budget < 0:
            raise _too_complex()

    def _forget_if_many(self) -> None:
        if self._n_kept > _MOST_KEPT:
            for state in self._states.values():
                state.after = {}
            self._states.clear()
            self._steps.clear()
            self._nodes.clear()
            self._n_kept = 0


class Matcher:
    """One sequence's place in a grammar. Implements :class:`~llamaherd.pool.child.constraint.Constraint`."""

    #: See :class:`Constraint`.
    choice: Choice = "some"

    def __init__(self, automaton: Automaton, at: _At | None = None) -> None:
        self._automaton: Final = automaton
        self._at = at if at is not None else automaton.start
        self._last: tuple[int, _At | None] = (-1, None)

    @property
    def complete(self) -> bool:
        """See :class:`Constraint`."""
        return not self._at.state.places and not self._at.missing

    def due(self) -> int | None:
        """See :class:`Constraint`."""
        return None

    def allows(self, token: int) -> bool:
        """See :class:`Constraint`."""
        self._automaton.budget = _MOST_FOR_TOKEN
        return self._allows(token)

    def allowed(self, tokens: Sequence[int], most: int) -> list[int]:
        """See :class:`Constraint`."""
        self._automaton.budget = _MOST_FOR_TOKEN
        return list(islice(filter(self._allows, tokens), most))

    def candidates(self) -> npt.NDArray[np.int64]:
        """See :class:`Constraint`."""
        vocab = self._automaton.alphabet.vocab
        if self._at.missing:
            return np.arange(vocab.size)
        return self._automaton.firsts(self._at.state)

    def accept(self, token: int) -> None:
        """See :class:`Constraint`."""
        if self._automaton.alphabet.vocab.ends(token):
            return
        last, after = self._last if self._last[0] == token else (token, self._automaton.advance(self._at, token))
        assert after is not None, f"token {last} was not allowed"
        self._at = after
        self._last = (-1, None)

    def feed(self, data: bytes) -> bool:
        """See :class:`Constraint`."""
        self._automaton.budget = _MOST_FOR_TOKEN
        after = self._automaton.advance_bytes(self._at, data)
        if after is not None:
            self._at = after
        self._last = (-1, None)
        return after is not None

    def copy(self) -> "Matcher":
        """See :class:`Constraint`."""
        return Matcher(self._automaton, self._at)

    def _allows(self, token: int) -> bool:
        if self._automaton.alphabet.vocab.ends(token):
            return self._automaton.allows_end(self._at, token)
        after = self._automaton.advance(self._at, token)
        self._last = (token, after)
        return after is not None


def _resolved(element: Element, token: Callable[[str], int]) -> Element:
    if isinstance(element, TokenRef) and isinstance(element.token, str):
        return TokenRef(token(element.token), element.negated)
    return element


def _too_complex() -> ConstraintError:
    return ConstraintError(
        "the grammar is too ambiguous or too large to be followed here; "
        "write it with fewer alternatives that begin alike, and fewer optional parts in a row",
        code="grammar_too_complex",
    )
