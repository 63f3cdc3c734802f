"""The figures of a comparison as text: a table a question, a row a model, and no column for what was not measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str | None]]


def find(row: Row, path: str) -> Any:
    """A figure by its names in a row, e.g. `judge_model.win_rate`; None where it is not there."""
    found: Any = row
    for name in path.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def mean(title: str, path: str, form: str = "{:z.2f}") -> Column:
    """A column of means, or of plain numbers."""

    def cell(row: Row) -> str | None:
        found = find(row, path)
        return None if found is None else form.format(found["mean"] if isinstance(found, dict) else found)

    return title, cell


def with_interval(title: str, path: str, form: str = "{:z.2f}") -> tuple[Column, Column]:
    """A column of means and one of their intervals."""

    def cell(row: Row) -> str | None:
        ends = find(row, f"{path}.interval")
        return None if ends is None else " to ".join(form.format(end) for end in ends)

    return mean(title, path, form), ("95 % interval", cell)


SHARE = "{:.0%}"
TABLES: tuple[tuple[Column, ...], ...] = (
    (*with_interval("judge", "total"), *(mean(part, part) for part in ("helpful", "honest", "harmless"))),
    (
        *with_interval("win rate", "win_rate", SHARE),
        *with_interval("at equal length", "length_controlled_win_rate", SHARE),
    ),
    (
        *with_interval("judge model: win rate", "judge_model.win_rate", SHARE),
        *with_interval("at equal length", "judge_model.length_controlled_win_rate", SHARE),
        mean("first preferred", "judge_model.first_preferred", SHARE),
        mean("contradictions", "judge_model.contradictions", SHARE),
    ),
    (
        *with_interval("KL", "kl"),
        mean("length", "length", "{:.1f}"),
        mean("EOS", "eos_rate", SHARE),
        mean("distinct-1", "distinct_1", "{:.3f}"),
        mean("distinct-2", "distinct_2", "{:.3f}"),
        mean("self-overlap", "self_overlap"),
        mean("rude", "rude", "{:.1%}"),
    ),
    (
        *with_interval("reward", "reward"),
        *with_interval("correlation with judge", "reward_correlation"),
        *with_interval("pairs as the judge", "reward_agreement", SHARE),
    ),
)


def table(summary: dict[str, Any]) -> str:
    """All tables that have a figure, and what they are about."""
    models = summary["models"]
    parts = [lines for columns in TABLES if (lines := rows(models, columns))]
    count = f"{summary['samples']} answer{'s' if summary['samples'] > 1 else ''} each"
    foot = f"{summary['prompts']} prompts, {count}; wins are against {summary['baseline']}; length in tokens"
    foot += f"; KL to {summary['reference']} in nats an answer" if summary["reference"] else ""
    return "\n\n".join([*parts, foot])


def rows(models: dict[str, Row], columns: Sequence[Column]) -> str:
    """One table; columns that are empty for every model are left out. "" without any."""
    filled = [(title, [cell(row) or "-" for row in models.values()]) for title, cell in columns]
    filled = [(title, cells) for title, cells in filled if set(cells) != {"-"}]
    if not filled:
        return ""
    names = ["model", *models]
    lines = [f"{name:<{max(map(len, names))}}" for name in names]
    for title, cells in filled:
        width = max(map(len, (title, *cells)))
        lines = [f"{line}  {cell:>{width}}" for line, cell in zip(lines, (title, *cells), strict=True)]
    return "\n".join(lines)
