"""What is wrong with a request, by the names that its client knows: some APIs have others for the pool's parameters."""

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Final

from llamaherd.pool import BadRequest

__all__ = ["as_sent"]

#: The pool's parameters that clients know by other names, in the order of their precedence.
_NAMES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "max_tokens": ("n_predict", "max_output_tokens", "max_completion_tokens", "max_tokens"),
        "stop": ("stop", "stop_sequences"),
        "messages": ("messages", "input"),
        "template_kwargs": ("chat_template_kwargs",),
        "reasoning_budget_tokens": ("reasoning_budget_tokens", "thinking_budget_tokens", "thinking"),
        "json_schema": ("json_schema", "response_format", "text", "output_config"),
        "response_format": ("response_format", "text", "output_config"),
        "inputs": ("input", "content"),
        "documents": ("documents", "texts"),
        "n_probs": ("n_probs", "logprobs"),
        "normalize": ("embd_normalize",),
        "prefix": ("input_prefix",),
        "suffix": ("input_suffix",),
        "extra": ("input_extra",),
    }
)


def as_sent(error: BadRequest, sent: Collection[str]) -> tuple[str, str | None]:
    """Return the text of an error about a request with these fields, and the one that is wrong, None if it is no single
    one.

    Where the client's name is another, its value often is built otherwise too, so nothing is said of the place in it.
    """
    text, name = str(error), error.param
    root = name.partition(".")[0].partition("[")[0]
    for field in _NAMES.get(root, (root,)):
        if field in sent:
            return field + text.removeprefix(root), name if field == root else field
    return text, None
