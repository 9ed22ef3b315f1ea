"""Keeps the characters that a user types apart from the special tokens that a chat template writes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice

IMAGE_TEXT = "<image>"
"""The placeholder of an image in a prompt string, whatever image token the tokenizer has."""
_PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))


def unused_characters(texts: Iterable[str]) -> Iterator[str]:
    """Private-use characters that no text has. There are more of them than a prompt may have characters."""
    used: set[str] = set().union(*texts)
    return (chr(code) for code in chain(*_PRIVATE_USE) if chr(code) not in used)


@dataclass(frozen=True)
class Typed:
    """Special tokens whose names may occur in texts, and what stands for them while a template is rendered.

    A text that names a special token, such as a question about the tag `<image>`, must reach the model as these
    characters. So before rendering each name in a text is replaced by a stand-in: private-use characters that no text
    of the conversation has, with the number of the name between them. The names that the template writes are real.
    """

    names: tuple[str, ...]
    """Longest first, so that no name hides a longer one."""
    brackets: tuple[str, str, str, str]
    """Private-use characters around the number of a name: of typed ones, and of real ones."""

    @classmethod
    def of(cls, names: Iterable[str], texts: Sequence[str]) -> Typed | None:
        """Of all `names`; None where no text has one."""
        ordered = tuple(sorted(set(names), key=lambda name: (-len(name), name)))
        if not any(name in text for name in ordered for text in texts):
            return None
        one, two, three, four = islice(unused_characters(texts), 4)
        return cls(ordered, (one, two, three, four))

    def hide(self, text: str) -> str:
        """A text with stand-ins for the names that are typed in it."""
        return self._replaced(text, self.brackets[:2])

    def mark(self, text: str) -> str:
        """A rendered text with `renamed` for the names in it, which are real."""
        return self._replaced(text, self.brackets[2:])

    def show(self, text: str) -> str:
        """A text with names for the stand-ins."""
        first, last = self.brackets[:2]
        return re.sub(f"{first}(\\d+){last}", lambda match: self.names[int(match.group(1))], text)

    @property
    def renamed(self) -> dict[str, str]:
        """Name -> what stands for it where it is real."""
        first, last = self.brackets[2:]
        return {name: f"{first}{i}{last}" for i, name in enumerate(self.names)}

    def _replaced(self, text: str, brackets: Sequence[str]) -> str:
        pattern = "|".join(map(re.escape, self.names))
        first, last = brackets
        return re.sub(pattern, lambda match: f"{first}{self.names.index(match.group())}{last}", text)
