"""Rude words: a list in a text file, and the texts that hold one of them.

A crude measure for real text, where there is no judge: it knows neither irony nor politeness, and counts a quotation
like an insult. Slurs against groups are left out of the shipped list: most have other meanings, and those need context.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from minirlhf.runtime import project_file, require

RUDE_WORDS = project_file("rude-words.txt")


class WordList:
    """`words.found(text)`: the entries' occurrences in a text, whole words in any case, as they stand there.

    entries  words or phrases; a `*` at the end of one stands for any ending
    """

    def __init__(self, entries: Iterable[str]) -> None:
        either = "|".join(
            r"\s+".join(map(re.escape, entry.removesuffix("*").split())) + (r"\w*" if entry.endswith("*") else "")
            for entry in entries
        )
        self._pattern = re.compile(rf"(?<!\w)(?:{either})(?!\w)", re.IGNORECASE)

    @classmethod
    def read(cls, path: Path) -> WordList:
        """From a text file with an entry a line; blank lines and lines that begin with `#` do not count."""
        require(path.is_file(), f"{path}: no such file; give a text file with a word or phrase a line")
        lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
        entries = [line for line in lines if line and not line.startswith("#")]
        require(bool(entries), f"{path}: no words; write one a line")
        bare = next((entry for entry in entries if not entry.removesuffix("*").strip()), None)
        require(bare is None, f"{path}: the entry {bare!r} stands for every word; write letters before the *")
        return cls(entries)

    def found(self, text: str) -> list[str]:
        """What of the list occurs in a text, in order."""
        return self._pattern.findall(text)
