"""Figures by model as text: a column a figure, a row a model, and no column for what was not measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
SHARE = "{:.0%}"


@dataclass(frozen=True)
class Column:
    """One column.

    path   the names that lead to the figure in a row, e.g. `judge_model.win_rate`: a number, an estimate or two ends
    form   of each number;  width  of the column at least
    """

    title: str
    path: str
    form: str = "{:z.2f}"
    width: int = 0

    def cell(self, row: Row) -> str:
        """The figure of a row; a dash where there is none."""
        value: Any = row
        for name in self.path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        value = value["mean"] if isinstance(value, dict) else value
        ends = value if isinstance(value, tuple | list) else (value,)
        return "-" if value is None else " to ".join(self.form.format(end) for end in ends)


def with_interval(title: str, path: str, form: str = "{:z.2f}", widths: tuple[int, int] = (0, 0)) -> list[Column]:
    """A column of means and one of their intervals."""
    interval = Column("95 % interval", f"{path}.interval", form, widths[1])
    return [Column(title, path, form, widths[0]), interval]


def rows(models: dict[str, Row], columns: Sequence[Column], width: int = 0, title: str = "model") -> str:
    """One table; columns that are empty for every model are left out. "" without any."""
    filled = [(column, [column.cell(row) for row in models.values()]) for column in columns]
    filled = [(column, cells) for column, cells in filled if set(cells) != {"-"}]
    names = [title, *models]
    lines = [f"{name:<{max(width, *map(len, names))}}" for name in names]
    for column, cells in filled:
        most = max(column.width, *map(len, (column.title, *cells)))
        lines = [f"{line}  {cell:>{most}}" for line, cell in zip(lines, (column.title, *cells), strict=True)]
    return "\n".join(lines) if filled else ""
