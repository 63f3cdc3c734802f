"""Figures as text: a column a figure, a row a model (or another group), and no column for what was not measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from minirlhf.evaluate.judges import PARTS

SHARE = "{:.0%}"


class Column(NamedTuple):
    """One column.

    path  the names that lead to the figure in a row, e.g. `judge_model.win_rate`: a number, an estimate or two ends
    form  of each number
    """

    title: str
    path: str
    form: str = "{:z.2f}"

    def cell(self, row: Mapping[str, Any]) -> str:
        """The figure of a row; a dash where there is none."""
        value: Any = row
        for name in self.path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        value = value["mean"] if isinstance(value, dict) else value
        if value is None or isinstance(value, str):
            return value or "-"
        return " to ".join(self.form.format(end) for end in (value if isinstance(value, tuple | list) else (value,)))


def with_interval(title: str, path: str, form: str = "{:z.2f}") -> list[Column]:
    """A column of means and one of their intervals."""
    return [Column(title, path, form), Column("95 % interval", f"{path}.interval", form)]


# The figures of models, a table a group.
FIGURES = (
    [*with_interval("judge", "total"), *(Column(part, part) for part in PARTS[1:])],
    [
        *with_interval("win rate", "win_rate", SHARE),
        *with_interval("at equal length", "length_controlled_win_rate", SHARE),
    ],
    [
        *with_interval("judge model: win rate", "judge_model.win_rate", SHARE),
        *with_interval("at equal length", "judge_model.length_controlled_win_rate", SHARE),
        Column("first preferred", "judge_model.first_preferred", SHARE),
        Column("contradictions", "judge_model.contradictions", SHARE),
    ],
    [
        *with_interval("KL", "kl"),
        Column("length", "length", "{:.1f}"),
        Column("EOS", "eos_rate", SHARE),
        *(Column(f"distinct-{n}", f"distinct_{n}", "{:.3f}") for n in (1, 2)),
        Column("self-overlap", "self_overlap"),
        Column("rude", "rude", "{:.1%}"),
    ],
    [
        *with_interval("reward", "reward"),
        *with_interval("correlation with judge", "reward_correlation"),
        *with_interval("pairs as the judge", "reward_agreement", SHARE),
    ],
)


def rows(groups: Mapping[str, Mapping[str, Any]], columns: Sequence[Column], title: str = "model") -> str:
    """One table; columns that are empty for every group are left out. "" without any."""
    cells = [[column.title, *map(column.cell, groups.values())] for column in columns]
    filled = [column for column in cells if set(column[1:]) != {"-"}]
    names = [name.ljust(max(map(len, [title, *groups]))) for name in (title, *groups)]
    padded = [[cell.rjust(max(map(len, column))) for cell in column] for column in filled]
    return "\n".join("  ".join(line) for line in zip(names, *padded, strict=True)) if filled else ""
