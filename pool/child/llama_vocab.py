"""Vocabularies of llama.cpp: text to ids and back, and which ids mean something."""

import ctypes
from collections.abc import Callable
from typing import Final

from llamaherd.pool.child.llama_library import BOOL, I32, LONG, PTR, SHORT, STR, bind

__all__ = [
    "FILL_IN_THE_MIDDLE",
    "add_bos",
    "add_eos",
    "add_sep",
    "bos",
    "eos",
    "fim",
    "is_eog",
    "kind",
    "n_tokens",
    "sep",
    "suppressed",
    "text_length",
    "token_to_piece",
    "tokenize",
]

kind: Callable[[int], int] = bind(SHORT, "llama_vocab_type", I32, PTR)
n_tokens: Callable[[int], int] = bind(SHORT, "llama_vocab_n_tokens", I32, PTR)
is_eog: Callable[[int, int], bool] = bind(SHORT, "llama_vocab_is_eog", BOOL, PTR, I32)
bos: Callable[[int], int] = bind(SHORT, "llama_vocab_bos", I32, PTR)
eos: Callable[[int], int] = bind(SHORT, "llama_vocab_eos", I32, PTR)
add_bos: Callable[[int], bool] = bind(SHORT, "llama_vocab_get_add_bos", BOOL, PTR)
add_eos: Callable[[int], bool] = bind(SHORT, "llama_vocab_get_add_eos", BOOL, PTR)
sep: Callable[[int], int] = bind(SHORT, "llama_vocab_sep", I32, PTR)
add_sep: Callable[[int], bool] = bind(SHORT, "llama_vocab_get_add_sep", BOOL, PTR)

#: What llama.cpp calls the tokens for infilling: what is before and after the gap, the gap, a repository, a file.
FILL_IN_THE_MIDDLE: Final = ("pre", "suf", "mid", "rep", "sep")
_fim = {name: bind(SHORT, f"llama_vocab_fim_{name}", I32, PTR) for name in FILL_IN_THE_MIDDLE}


def fim(vocab: int, name: str) -> int:
    """Return one of the tokens for infilling, -1 where the vocabulary has none; ``name`` is of the list above."""
    token: int = _fim[name](vocab)
    return token


_suppressed = bind(SHORT, "llama_vocab_get_suppress_tokens", ctypes.POINTER(I32), PTR, ctypes.POINTER(ctypes.c_int32))
_text_of = bind(SHORT, "llama_vocab_get_text", STR, PTR, I32)
# Long texts take long: without the GIL.
_tokenize = bind(LONG, "llama_tokenize", I32, PTR, STR, I32, PTR, I32, BOOL, BOOL)
_to_piece = bind(SHORT, "llama_token_to_piece", I32, PTR, I32, STR, I32, I32, BOOL)
_piece_buffer = ctypes.create_string_buffer(256)


def suppressed(vocab: int) -> tuple[int, ...]:
    """Return the tokens that the model's maker wants never to be generated."""
    count = ctypes.c_int32()
    tokens = _suppressed(vocab, ctypes.byref(count))
    return tuple(tokens[: count.value]) if tokens else ()


def text_length(vocab: int, token: int) -> int:
    """Return the bytes of a token's entry in the vocabulary, as stored."""
    text: bytes | None = _text_of(vocab, token)
    return len(text or b"")


def tokenize(vocab: int, text: bytes, address: int, room: int, *, add_special: bool, parse_special: bool) -> int:
    """Write at most ``room`` int32 ids to ``address``; return their number, negative: how many there would be."""
    count: int = _tokenize(vocab, text, len(text), address, room, add_special, parse_special)
    return count


def token_to_piece(vocab: int, token: int, *, special: bool) -> bytes:
    """Return the bytes of one token; control tokens are empty unless ``special``."""
    length: int = _to_piece(vocab, token, _piece_buffer, len(_piece_buffer), 0, special)
    if length >= 0:
        return _piece_buffer.raw[:length]
    larger = ctypes.create_string_buffer(-length)
    length = _to_piece(vocab, token, larger, len(larger), 0, special)
    return larger.raw[: max(length, 0)]
