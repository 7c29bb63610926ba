"""JSON Schemas as constraints: llguidance converts and follows them, in bounded time and memory.

Importing it takes some 40 ms and telling it a vocabulary of 50,000 tokens 300 ms, so both wait for the first request
that brings a schema.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

import llguidance
import numpy as np
import numpy.typing as npt

from llamaherd.pool.child.constraint import Choice, ConstraintError
from llamaherd.pool.child.engine import RequestError
from llamaherd.pool.child.vocab import Vocab

__all__ = ["JsonGrammars"]

#: As much space as llama.cpp's converter allows: a small model would else fill its answer with it.
_SPACE: Final = r"( |\n{1,2}[ \t]{0,20})"
#: About 100 ms to compile, 20 ms and 100 MB to follow. Errors must not quote the grammar.
_LIMITS: Final[dict[str, Any]] = {
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 2_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 100_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
#: Compiled schemas that are kept.
_MOST_KEPT: Final = 8


_S = TypeVar("_S")
_P = ParamSpec("_P")
_R = TypeVar("_R")


def _contained(method: Callable[Concatenate[_S, _P], _R]) -> Callable[Concatenate[_S, _P], _R]:
    """Have a panic of llguidance fail the one request that it is about.

    pyo3 raises it as a ``BaseException`` of its own, which nobody can import and no ``except Exception`` would stop, so
    it would end the worker.
    """

    @functools.wraps(method)
    def call(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return method(self, *args, **kwargs)
        except BaseException as error:
            if type(error).__module__ != "pyo3_runtime":
                raise
            raise ConstraintError(
                f"the library that follows schemas broke: {_reason(error)}", code="grammar_broke"
            ) from None

    return call


class _Tokens:
    """The vocabulary in the form that llguidance asks for: control tokens are marked by a byte that no text has."""

    is_tokenizer_wrapper = True

    def __init__(self, vocab: Vocab) -> None:
        self._vocab: Final = vocab
        self.eos_token_id: Final = max(vocab.eos, 0)
        self.bos_token_id: Final = vocab.bos if vocab.bos >= 0 else None
        shown = [vocab.piece(token) for token in range(vocab.size)]
        self.special_token_ids: Final = [token for token, piece in enumerate(shown) if not piece]
        # The byte alone would be the beginning of every control token, and so allowed wherever one is.
        self.tokens: Final = [
            piece or b"\xff" + (vocab.named_piece(token) or b"<>") for token, piece in enumerate(shown)
        ]

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        return self._vocab.tokenize(text, add_special=False)


class JsonGrammars:
    """The compiled schemas of one loaded model."""

    def __init__(self, vocab: Vocab) -> None:
        self._vocab: Final = vocab
        self._ends: Final = list(vocab.end_tokens)
        self._tokenizer: Final[Any] = self._tokenizer_of(_Tokens(vocab))
        self._limits: Final = llguidance.LLParserLimits(**_LIMITS)
        self._compiled: Final[dict[str, Any]] = {}

    @_contained
    def _tokenizer_of(self, tokens: Any) -> Any:
        return llguidance.LLTokenizer(
            tokens, eos_token=self._ends or [tokens.eos_token_id], slices=llguidance.LLTokenizer.json_slices()
        )

    def make(self, schema: str) -> "JsonConstraint":
        """Return the constraint of a schema. Raises RequestError for what the converter refuses."""
        return self._follow(schema, lambda: _grammar_of(schema), "json_schema")

    def make_calls(self, lark: str, subject: str) -> "JsonConstraint":
        """Return the constraint of tool calls in llguidance's own notation, which holds their schemas. Raises
        RequestError, which names the ``subject``.
        """
        return self._follow(lark, lambda: llguidance.LLMatcher.grammar_from_lark(lark), subject)

    @_contained
    def _follow(self, source: str, grammar: Callable[[], str], what: str) -> "JsonConstraint":
        compiled = self._compiled.pop(source, None) or self._compile(grammar, what)
        self._compiled[source] = compiled
        if len(self._compiled) > _MOST_KEPT:
            del self._compiled[next(iter(self._compiled))]
        return JsonConstraint(compiled.deep_copy(), self._tokenizer, self._vocab, self._ends)

    def _compile(self, grammar: Callable[[], str], what: str) -> Any:
        try:
            matcher = llguidance.LLMatcher(self._tokenizer, grammar(), log_level=0, limits=self._limits)
        except ValueError as error:
            raise RequestError(f"{what}: {_reason(error)}", code="invalid_json_schema") from None
        if matcher.is_error():
            raise RequestError(f"{what}: {_reason(matcher.get_error())}", code="invalid_json_schema")
        return matcher


def _grammar_of(schema: str) -> str:
    overrides: Any = {"whitespace_flexible": True, "whitespace_pattern": _SPACE, "lenient": False}
    grammar: str = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=overrides)
    return grammar


class JsonConstraint:
    """One sequence's place in a schema. Implements :class:`~llamaherd.pool.child.constraint.Constraint`."""

    #: See :class:`Constraint`.
    choice: Choice = "some"

    def __init__(self, matcher: Any, tokenizer: Any, vocab: Vocab, ends: list[int]) -> None:
        self._matcher: Final = matcher
        self._tokenizer: Final = tokenizer
        self._vocab: Final = vocab
        self._ends: Final = ends
        self._mask: npt.NDArray[np.bool_] | None = None

    @property
    @_contained
    def complete(self) -> bool:
        """See :class:`Constraint`."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def due(self) -> int | None:
        """See :class:`Constraint`."""
        return None

    @_contained
    def allows(self, token: int) -> bool:
        """See :class:`Constraint`."""
        if self._vocab.ends(token):
            return bool(self._matcher.is_accepting())
        allowed: bool = self._matcher.validate_tokens([token]) == 1
        if not allowed:
            self._check()
        return allowed

    @_contained
    def allowed(self, tokens: Sequence[int], most: int) -> list[int]:
        """See :class:`Constraint`."""
        asked = np.asarray(tokens, np.int64)
        found: list[int] = asked[self._allowed_tokens()[asked]][:most].tolist()
        return found

    @_contained
    def candidates(self) -> npt.NDArray[np.int64]:
        """See :class:`Constraint`."""
        return np.flatnonzero(self._allowed_tokens())

    @_contained
    def accept(self, token: int) -> None:
        """See :class:`Constraint`."""
        if self._vocab.ends(token):
            return
        self._mask = None
        if not self._matcher.consume_token(token):
            self._check()

    @_contained
    def feed(self, data: bytes) -> bool:
        """See :class:`Constraint`."""
        self._mask = None
        tokens = self._tokenizer.tokenize_bytes(data)
        if self._matcher.validate_tokens(tokens) < len(tokens):
            return False
        return bool(self._matcher.consume_tokens(tokens))

    @_contained
    def copy(self) -> "JsonConstraint":
        """See :class:`Constraint`."""
        return JsonConstraint(self._matcher.deep_copy(), self._tokenizer, self._vocab, self._ends)

    def _allowed_tokens(self) -> npt.NDArray[np.bool_]:
        if self._mask is None:
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            self._check()
            self._mask = np.unpackbits(bits, bitorder="little")[: self._vocab.size].astype(np.bool_)
            self._mask[self._ends] = self._matcher.is_accepting()
        return self._mask

    def _check(self) -> None:
        """Raise what llguidance keeps to itself: it never raises, and refuses everything after an error."""
        if self._matcher.is_error():
            raise ConstraintError(
                f"the JSON schema is too complex to be followed: {_reason(self._matcher.get_error())}",
                code="grammar_too_complex",
            )


def _reason(error: object) -> str:
    """Return what llguidance says, on one line."""
    return " ".join(str(error).split())[:300] or "no reason was given"
