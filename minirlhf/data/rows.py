"""What reading a file gives: values with their places, and the lines that cannot be read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One value of a file and its place, `file:line`."""

    place: str
    value: Any


@dataclass(frozen=True)
class Bad:
    """A line that cannot be read, and why."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


@dataclass
class Content:
    """The rows of a file. `container` says in words what the file is."""

    container: str
    rows: list[Row] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)
