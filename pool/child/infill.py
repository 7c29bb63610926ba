"""Prompts for infilling: what is before and after a gap, put together with the vocabulary's own tokens.

The order is that of repository-level infilling (arXiv 2409.12186), and the shares are llama-server's: of a batch three
quarters for what is before and a quarter for what is after the gap, and further files as far as the context has room.
But no more than half of the context is taken, where llama-server lets a batch fill it, and then refuses its own prompt.
What is too long loses its far end. Texts are cut before they are tokenised, so that a huge file costs nothing.
"""

from typing import Final

from llamaherd.pool.child.engine import RequestError
from llamaherd.pool.child.vocab import Vocab
from llamaherd.transport.messages import Infill

__all__ = ["infill_tokens"]

#: No usual token is longer, in characters.
_TOKEN_LENGTH: Final = 32
_REPOSITORY: Final = "myproject\n"
_THIS_FILE: Final = "filename\n"
#: Between files, for vocabularies without a token for it.
_SNIPPET: Final = "\n\n--- snippet ---\n\n"
_NEEDED: Final = {"pre": "prefix", "suf": "suffix", "mid": "middle"}


def infill_tokens(
    vocab: Vocab, infill: Infill, *, n_batch: int, n_ctx: int, max_tokens: int, suffix_first: bool
) -> list[int]:
    """Return the prompt's ids.

    Args:
        n_batch: What the text around the gap may take, in tokens, if that is at most half of ``n_ctx``.
        n_ctx: What all of it may take, the answer included.
        max_tokens: What the answer may take; less than 0 if nobody knows.
        suffix_first: For models that want what is after the gap ahead of what is before it.

    Raises:
        RequestError: the vocabulary lacks a token for infilling.
    """
    missing = [word for name, word in _NEEDED.items() if vocab.infill_token(name) < 0]
    if missing:
        lacks = " ".join(f"{word} token is missing." for word in missing)
        raise RequestError(f"Infill is not supported by this model: {lacks}", code="unsupported_by_model")

    prompt = vocab.tokenize(infill.prompt, add_special=False, parse_special=True)
    window = min(n_batch, n_ctx // 2)
    quarter = window // 4
    before = _last(vocab, infill.prefix, 3 * quarter)
    after = _first(vocab, infill.suffix, max(0, quarter - (2 + len(prompt))))
    parts = [[vocab.infill_token("pre"), *before, *prompt], [vocab.infill_token("suf"), *after]]
    if suffix_first:
        parts.reverse()
    tokens = [*([vocab.bos] if vocab.adds_bos else []), *parts[0], *parts[1], vocab.infill_token("mid")]
    answer = max(0, max_tokens)
    room = min(n_ctx - window - 2 * answer, n_ctx - 1 - answer - len(tokens))
    return _files(vocab, infill, max(0, room)) + tokens


def _files(vocab: Vocab, infill: Infill, room: int) -> list[int]:
    """Return the other files, without the first ones if there is not room for all."""
    repository, separator = vocab.infill_token("rep"), vocab.infill_token("sep")
    tokens = [repository, *_plain(vocab, _REPOSITORY)] if repository >= 0 else []
    for file in infill.extra:
        name = file.filename[-_TOKEN_LENGTH * room :] + "\n" if room else "\n"
        tokens += [separator, *_plain(vocab, name)] if separator >= 0 else _plain(vocab, _SNIPPET)
        tokens += _last(vocab, file.text, room)
    if separator >= 0:
        tokens += [separator, *_plain(vocab, _THIS_FILE)]
    return tokens[-room:] if room else []


def _last(vocab: Vocab, text: str, count: int) -> list[int]:
    return _plain(vocab, text[-_TOKEN_LENGTH * count :])[-count:] if count else []


def _first(vocab: Vocab, text: str, count: int) -> list[int]:
    return _plain(vocab, text[: _TOKEN_LENGTH * count])[:count]


def _plain(vocab: Vocab, text: str) -> list[int]:
    return vocab.tokenize(text, add_special=False, parse_special=False)
