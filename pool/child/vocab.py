"""Text to token ids and back, with the ids checked: llama.cpp aborts on some that are out of range."""

from collections.abc import Sequence
from functools import cached_property
from typing import Final

from llamaherd.pool.child import llama_model, llama_sampler, llama_vocab
from llamaherd.pool.child.engine import RequestError

__all__ = ["Vocab"]

#: llama.cpp's number for "this model has no vocabulary"; tokenising would abort.
_NO_VOCAB: Final = 0
#: No token of any known vocabulary is longer, in bytes; only a text beyond this per token is measured exactly.
_USUAL_TOKEN_BYTES: Final = 32


class Vocab:
    """The vocabulary of one loaded model; unusable after the model is freed."""

    def __init__(self, model: int) -> None:
        self._handle: Final = llama_model.vocab(model)
        self.kind: Final = llama_vocab.kind(self._handle)
        self.size: Final = llama_vocab.n_tokens(self._handle)
        self.bos: Final = llama_vocab.bos(self._handle)
        self.eos: Final = llama_vocab.eos(self._handle)
        self.adds_bos: Final = llama_vocab.add_bos(self._handle)
        self.adds_eos: Final = llama_vocab.add_eos(self._handle)
        self.sep: Final = llama_vocab.sep(self._handle)
        self.adds_sep: Final = llama_vocab.add_sep(self._handle)
        #: Tokens that the model's maker wants never to be generated.
        self.suppressed: Final = llama_vocab.suppressed(self._handle)
        # Filled as tokens come: asking llama.cpp costs several times a look-up, and for all tokens it would take long.
        self._pieces: Final[dict[int, bytes]] = {}
        self._ends: Final[dict[int, bool]] = {}
        self._longest = 0

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool = False) -> list[int]:
        """Return the ids of a text. Raises RequestError when the model has no vocabulary."""
        if self.kind == _NO_VOCAB:
            raise RequestError("this model has no vocabulary, so text cannot be tokenised", code="not_supported")
        import numpy as np  # here and not above: the model is read before numpy is there

        data = text.encode("utf-8", "replace")
        room = len(data) + 8
        for _ in range(2):
            ids = np.empty(room, np.int32)
            count = llama_vocab.tokenize(
                self._handle, data, ids.ctypes.data, room, add_special=add_special, parse_special=parse_special
            )
            if count >= 0:
                tokens: list[int] = ids[:count].tolist()
                return tokens
            room = -count
        raise RequestError(f"a text of {len(data)} bytes cannot be tokenised", code="tokenize_failed")

    def check(self, tokens: Sequence[int]) -> None:
        """Raise RequestError unless every id is of this vocabulary."""
        for index, token in enumerate(tokens):
            if not 0 <= token < self.size:
                raise RequestError(
                    f"token {token} at index {index} is not in the vocabulary of {self.size} tokens",
                    code="invalid_token",
                )

    def piece(self, token: int) -> bytes:
        """Return the bytes that a generated token shows; control tokens show nothing."""
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = llama_vocab.token_to_piece(self._handle, token, special=False)
        return piece

    def named_piece(self, token: int) -> bytes:
        """Return the bytes of a token; control tokens are spelled by their name."""
        return self.piece(token) or llama_vocab.token_to_piece(self._handle, token, special=True)

    def dry_sampler(self, recipe: llama_sampler.DryRecipe) -> int:
        """Return a new sampler against repetition, which knows how this vocabulary spells the sequence breakers."""
        return llama_sampler.dry(self._handle, recipe)

    def infill_token(self, name: str) -> int:
        """Return the token for infilling with a name of :data:`llama_vocab.FILL_IN_THE_MIDDLE`, -1 if there is none."""
        return llama_vocab.fim(self._handle, name)

    def name(self, token: int) -> str:
        """Return the text of a token, control tokens by their name; empty for -1, "this model has none"."""
        if not 0 <= token < self.size:
            return ""
        return llama_vocab.token_to_piece(self._handle, token, special=True).decode("utf-8", "replace")

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Return the text of checked ids, control tokens by their name and invalid UTF-8 replaced."""
        return b"".join(llama_vocab.token_to_piece(self._handle, token, special=True) for token in tokens).decode(
            "utf-8", "replace"
        )

    def pieces(self, tokens: Sequence[int]) -> tuple[bytes, ...]:
        """Return the bytes of each of checked ids, control tokens by their name."""
        return tuple(llama_vocab.token_to_piece(self._handle, token, special=True) for token in tokens)

    def ends(self, token: int) -> bool:
        """Whether a token ends the generation."""
        ends = self._ends.get(token)
        if ends is None:
            ends = self._ends[token] = llama_vocab.is_eog(self._handle, token)
        return ends

    @cached_property
    def end_tokens(self) -> tuple[int, ...]:
        """All tokens that end the generation. Found when it is first asked for, in a third of a microsecond for each
        token of the vocabulary.
        """
        return tuple(token for token in range(self.size) if llama_vocab.is_eog(self._handle, token))

    def least_tokens(self, length: int, limit: int) -> int:
        """Return how many tokens a text of ``length`` characters has at least; 0 if it may be fewer than ``limit``.

        Lets a huge prompt be refused in microseconds, where tokenising it would keep everyone waiting.
        """
        if length <= limit * _USUAL_TOKEN_BYTES:
            return 0
        if not self._longest:
            self._longest = max(llama_vocab.text_length(self._handle, token) for token in range(self.size))
        return length // max(1, self._longest)
