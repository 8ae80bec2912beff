"""Words that hedge, in many languages: data in `words/hedges.txt`, or a file of the user's own, counted in text.

    Lexicon.read(folder) ──▶ count("vielleicht, wer weiß") = 1

Words and phrases are found in the text, not among token ids, since most languages' words are several tokens. In scripts
without spaces between words an entry counts wherever it stands. Standard library only. Read next: `hacks.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).with_name("words")
HEDGES_FILE = "hedges.txt"
UNSPACED = re.compile("[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]")
"""Thai and Lao, kana, Han."""


@dataclass(frozen=True)
class Lexicon:
    """A set of words and phrases, compiled."""

    pattern: re.Pattern[str] | None
    """None where there is no word."""

    @staticmethod
    def read(folder: Path | None = None) -> Lexicon:
        """The words of the folder, one a line, # for remarks; none where it has no such file; by default the shipped.

        >>> Lexicon.read().count("Perhaps it depends."), Lexicon.read().count("也许吧"), Lexicon.read().count("No.")
        (2, 1, 0)
        """
        file = (folder or FOLDER) / HEDGES_FILE
        lines = file.read_text("utf-8").splitlines() if file.is_file() else []
        return Lexicon.of([line.strip() for line in lines if line.strip() and not line.startswith("#")])

    @staticmethod
    def of(words: list[str]) -> Lexicon:
        """These words, whole; capitals do not matter."""
        longest_first = sorted({word.casefold() for word in words}, key=lambda word: (-len(word), word))
        spaced = "|".join(re.escape(word) for word in longest_first if not UNSPACED.search(word))
        unspaced = [re.escape(word) for word in longest_first if UNSPACED.search(word)]
        # Asked at the beginnings of words alone, which is several times as fast as at every letter.
        forms = ([rf"(?<!\w)(?:{spaced})(?!\w)"] if spaced else []) + unspaced
        return Lexicon(re.compile("|".join(forms)) if forms else None)

    def find(self, text: str) -> list[str]:
        """The words in the text, in their order, in small letters."""
        return [] if self.pattern is None else self.pattern.findall(text.casefold())

    def count(self, text: str) -> int:
        """How many of the words stand in the text."""
        return len(self.find(text))

    def holds(self, word: str) -> bool:
        """Whether the word, a token's say, is one of these."""
        return self.pattern is not None and self.pattern.fullmatch(word.casefold()) is not None
