"""A file of records, read strictly: every value is checked, and a bad one is named with its line.

Candidates, labels and Label Studio's files all come through here, so their errors look alike: `file:line: reason`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from minirlhf.data.containers import Bad
from minirlhf.data.formats import BadRow, describe, text_of
from minirlhf.data.readers import read_source
from minirlhf.runtime import UserError, require

T = TypeVar("T")
Row = dict[str, Any]


def read_lines(path: Path, parse: Callable[[Row], T]) -> list[T]:
    """`parse` of every object in a JSON Lines file or JSON array.

    Raises UserError with file, line and reason of the first object that is not JSON or that `parse` refuses (BadRow).
    """
    content = read_source(Path(path), "", ())
    values, bad = [], list(content.bad)
    for row in content.rows:
        try:
            if not isinstance(row.value, dict):
                raise BadRow("not a JSON object; each line must hold one")
            values.append(parse(row.value))
        except BadRow as error:
            bad.append(Bad(row.place, str(error)))
    if bad:
        first = min(bad, key=lambda found: int(found.place.rpartition(":")[2]))
        raise UserError(f"{first} (bad lines: {len(bad)}; nothing was read)")
    require(len(values) > 0, f"{path}: holds no records")
    return values


def texts_of(row: Row, name: str, *, count: int | None = None) -> tuple[str, ...]:
    """A list of texts, `count` of them where given; raises BadRow."""
    values = list_of(row, name, count=count)
    return tuple(text_of({f"{name}[{i}]": value}, f"{name}[{i}]") for i, value in enumerate(values))


def list_of(row: Row, name: str, *, count: int | None = None) -> list[Any]:
    """A list, of `count` values where given; raises BadRow."""
    if name not in row:
        raise BadRow(f"no field {name!r} in this record")
    values = row[name]
    if not isinstance(values, list):
        raise BadRow(f"the field {name!r} is {describe(values)}, not a list")
    if count is not None and len(values) != count:
        raise BadRow(f"{name!r} has {len(values)} values for {count} responses")
    return values


def whole_numbers(row: Row, name: str, *, count: int) -> tuple[int, ...]:
    """A list of `count` whole numbers of 0 or more; raises BadRow."""
    values = list_of(row, name, count=count)
    if not all(type(value) is int and value >= 0 for value in values):
        raise BadRow(f"{name!r} must be whole numbers of 0 or more")
    return tuple(values)


def numbers_of(row: Row, name: str, *, count: int) -> tuple[float, ...]:
    """A list of `count` finite numbers; raises BadRow."""
    values = list_of(row, name, count=count)
    if not all(type(value) in (int, float) and math.isfinite(value) for value in values):
        raise BadRow(f"{name!r} must be numbers")
    return tuple(values)


def two_shares_of(row: Row, name: str) -> tuple[float, float]:
    """A list of two numbers from 0 to 1; raises BadRow."""
    first, second = numbers_of(row, name, count=2)
    if not (0 <= first <= 1 and 0 <= second <= 1):
        raise BadRow(f"{name!r} must be probabilities, from 0 to 1")
    return first, second


def responses_of(row: Row) -> tuple[str, ...]:
    """The responses of a record: at least two, no two alike; raises BadRow."""
    responses = texts_of(row, "responses")
    if len(responses) < 2:
        raise BadRow(f"{len(responses)} responses; a comparison needs at least 2")
    if len(set(responses)) < len(responses):
        raise BadRow("two responses are the same text")
    return responses


def response_ids_of(row: Row, count: int) -> tuple[list[int], ...] | None:
    """Token ids of the responses as they were sampled, None where they are not known; raises BadRow."""
    if row.get("response_ids") is None:
        return None
    values = list_of(row, "response_ids", count=count)
    if not all(isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids) for ids in values):
        raise BadRow("'response_ids' must be a list of token ids for each response")
    return tuple(values)


def number_of(row: Row, name: str) -> float | None:
    """A finite number of 0 or more, None where it is not given; raises BadRow."""
    value = row.get(name)
    if value is not None and not (type(value) in (int, float) and math.isfinite(value) and value >= 0):
        raise BadRow(f"the field {name!r} is {describe(value)}, not a number of 0 or more")
    return value
