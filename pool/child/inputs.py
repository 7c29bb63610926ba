"""What callers give to be embedded, scored or infilled, as token ids that a context can take."""

import re
from typing import Final

from llamaherd.pool.child.vocab import Vocab
from llamaherd.transport.messages import Prompt

__all__ = ["MOST_INPUTS", "least_tokens", "pair_tokens", "prompt_tokens"]

#: Most inputs or documents in one command; the pool sends larger batches in several.
MOST_INPUTS: Final = 4096
_MARK: Final = re.compile(r"\{query\}|\{document\}")


def prompt_tokens(vocab: Vocab, prompt: Prompt, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
    """Return the ids of a prompt. What the tokenizer puts around a text is put around a text that comes first.

    Raises:
        RequestError: an id is not of the vocabulary, or the model has none.
    """
    if isinstance(prompt, str):
        return vocab.tokenize(prompt, add_special=add_special, parse_special=parse_special)
    tokens: list[int] = []
    for index, part in enumerate(prompt):
        if isinstance(part, str):
            tokens += vocab.tokenize(part, add_special=add_special and index == 0, parse_special=parse_special)
        else:
            tokens.append(part)
    vocab.check(tokens)
    return tokens


def least_tokens(vocab: Vocab, prompt: Prompt, limit: int) -> int:
    """Return how many tokens a prompt has at least; 0 if it may be fewer than ``limit``."""
    if isinstance(prompt, str):
        return vocab.least_tokens(len(prompt), limit)
    ids = sum(1 for part in prompt if not isinstance(part, str))
    texts = sum(len(part) for part in prompt if isinstance(part, str))
    return ids + vocab.least_tokens(texts, limit)


def pair_tokens(vocab: Vocab, template: str, query: str, document: str) -> list[int]:
    """Return the ids of a query and a document, put together as rerankers are trained.

    That is the model's ``rerank`` template with ``{query}`` and ``{document}`` replaced; without one it is
    ``[BOS] query [EOS] [SEP] document [EOS]``, each special token only if the vocabulary says so. The separator stands
    in for an end token that is missing.
    """
    if template:
        # In one pass: a query that spells the other mark is a text like any other.
        text = _MARK.sub(lambda mark: query if mark[0] == "{query}" else document, template)
        return vocab.tokenize(text, add_special=False, parse_special=True)
    eos = vocab.eos if vocab.eos >= 0 else vocab.sep
    begin = [vocab.bos] if vocab.adds_bos else []
    end = [eos] if vocab.adds_eos else []
    middle = [vocab.sep] if vocab.adds_sep else []
    asked = vocab.tokenize(query, add_special=False, parse_special=False)
    given = vocab.tokenize(document, add_special=False, parse_special=False)
    return [token for token in (*begin, *asked, *end, *middle, *given, *end) if token >= 0]
