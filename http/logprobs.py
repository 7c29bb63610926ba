"""How likely tokens were, as clients read it: OpenAI's ``logprobs`` and llama-server's ``completion_probabilities``.

Both hold the same entries: with a ``logprob``, or with a ``prob`` where they tell what the samplers have left. The
chosen token has one also if it brought no text, as the end of an answer does.
"""

import codecs
import math
from collections.abc import Sequence
from typing import Any, Final

from llamaherd.pool import Completion, TokenProb, TokenProbs

__all__ = ["kept_probs", "logprobs_json", "probs_json"]

_Utf8: Final = codecs.getincrementaldecoder("utf-8")


def probs_json(probs: Sequence[TokenProbs], shown: int, *, post: bool = False) -> list[dict[str, Any]]:
    """Return an entry per token, with the ``shown`` most likely ones of each; ``post``: they are what was left."""
    name = "top_probs" if post else "top_logprobs"
    return [
        {**_token_json(one.chosen, post), name: [_token_json(top, post) for top in one.top[:shown]]} for one in probs
    ]


def logprobs_json(probs: Sequence[TokenProbs], shown: int | None, *, post: bool = False) -> dict[str, Any] | None:
    """Return a choice's ``logprobs``; None where none were asked for."""
    return None if shown is None else {"content": probs_json(probs, shown, post=post)}


def kept_probs(completion: Completion) -> Sequence[TokenProbs]:
    """Return the entries of the tokens that the answer is made of: without those of the stop text that ended it."""
    probs, word = completion.probs, completion.stopping_word.encode()
    if not word:
        return probs
    end = b"".join(one.chosen.piece for one in probs).find(word)
    start = 0
    for index, one in enumerate(probs):
        if 0 <= end <= start:
            return probs[:index]
        start += len(one.chosen.piece)
    return probs


def _token_json(one: TokenProb, post: bool) -> dict[str, Any]:
    # A token may end within a character. As llama-server does, the text has what is complete, and the bytes have all.
    text = _Utf8("replace").decode(one.piece)
    told: dict[str, Any] = {"id": one.token, "token": text, "bytes": list(one.piece)}
    return {**told, "prob": math.exp(one.logprob)} if post else {**told, "logprob": one.logprob}
