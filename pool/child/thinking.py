"""Where a model's reasoning begins and ends: the tags that its chat template shows."""

import re
from dataclasses import dataclass
from typing import Final

__all__ = ["Tags", "tags_of"]


@dataclass(frozen=True)
class Tags:
    """The tags around reasoning.

    Attributes:
        start: The tag that opens it.
        end: The tag that closes it.
    """

    start: str
    end: str

    def opened_by(self, prompt: str) -> bool:
        """Whether a prompt ends with the tag that opens reasoning."""
        return prompt.rstrip().endswith(self.start)


#: Found in templates; the first whose tags both stand there is the model's own.
_KNOWN: Final = (
    Tags("[THINK]", "[/THINK]"),
    Tags("<|START_THINKING|>", "<|END_THINKING|>"),
    Tags("<|channel>thought", "<channel|>"),
    Tags("<seed:think>", "</seed:think>"),
    Tags("<|inner_prefix|>", "<|inner_suffix|>"),
    Tags("<|begin_of_thought|>", "<|end_of_thought|>"),
    Tags("<think>", "</think>"),
    Tags("<thinking>", "</thinking>"),
    Tags("<thought>", "</thought>"),
    Tags("<reasoning>", "</reasoning>"),
    Tags("<|think|>", "<|/think|>"),
)
#: Templates that say what to do with a tag's end only, such as those that strip old reasoning.
_ENDS: Final = re.compile(r"</think>")


def tags_of(template: str) -> Tags | None:
    """Return the tags of a template's model; None if it shows none."""
    for tags in _KNOWN:
        if tags.start in template and tags.end in template:
            return tags
    return Tags("<think>", "</think>") if _ENDS.search(template) else None
