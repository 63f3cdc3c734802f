"""Where rows come from: a file on this machine, a slice of it, or a data set on the hub, under the names we use."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minirlhf import hub
from minirlhf.data.files import read_file
from minirlhf.data.rows import Content, Row
from minirlhf.runtime import UserError, require

# owner/name, then a folder in it, a configuration, a revision: Anthropic/hh-rlhf/helpful-base, openai/gsm8k:main
HUB_NAME = re.compile(
    r"(?P<name>\w[\w.-]*/\w[\w.-]*)(/(?P<folder>[\w./-]+))?(:(?P<config>[\w.-]+))?(@(?P<revision>\w+))?"
)
FILE_SUFFIX = re.compile(r".*\.(json|jsonl|gz|parquet|tsv|csv|txt)")  # of a missing file: the hub is not asked for it
SLICE = re.compile(r"(?P<name>\w*)(\[(?P<start>\d+%?)?:(?P<stop>\d+%?)?\])?")


def read_source(source: str | Path, split: str, columns: Sequence[str]) -> Content:
    """The rows of a file or hub name, sliced, with fields renamed ("ours=theirs")."""
    wanted = SLICE.fullmatch(split)
    if wanted is None:
        raise UserError(f"--split {split}: write a name, a slice or both, e.g. train, [:90%], test[1000:]")
    content = _read_hub(str(source), wanted) if is_hub_name(source) else _read_local(Path(source), wanted)
    pairs = [_column(text) for text in columns]
    if not content.container.startswith("plain text"):
        content.rows = [Row(row.place, _renamed(row, pairs)) for row in content.rows]
    return content


def is_hub_name(source: str | Path) -> bool:
    """Whether a source is a name on the hub: it looks like one, and no file here has it."""
    text = str(source)
    named = isinstance(source, str) and HUB_NAME.fullmatch(text) is not None and FILE_SUFFIX.fullmatch(text) is None
    return named and not Path(text).exists()


def local_files(*sources: str | Path | None) -> tuple[Path, ...]:
    """Those of the sources that are files on this machine, whose hashes a run can keep."""
    return tuple(Path(source) for source in sources if source is not None and Path(source).is_file())


def _read_local(path: Path, split: re.Match[str]) -> Content:
    require(not path.is_dir(), f"{path}: a folder; give one file")
    require(path.is_file(), f"{path}: no such file")
    require(path.stat().st_size > 0, f"{path}: an empty file, it holds no records")
    require(not split["name"], f"--split {split[0]}: a file has no splits; give a slice, e.g. [:90%]")
    content = read_file(path)
    content.rows = content.rows[_slice(split, len(content.rows))]
    return content


def _slice(split: re.Match[str], count: int) -> slice:
    def place(text: str | None) -> int | None:
        if text is None:
            return None
        return round(int(text[:-1]) * count / 100) if text.endswith("%") else int(text)

    return slice(place(split["start"]), place(split["stop"]))


def _read_hub(source: str, split: re.Match[str]) -> Content:
    """Rows of a data set on the hub. A slice that ends at a number is streamed: only what is read is downloaded."""
    from huggingface_hub import constants

    parts = HUB_NAME.fullmatch(source)
    advice = "or give a file: JSON Lines, JSON, TSV, Parquet or text"
    revision, name = parts["revision"], split["name"] or "train"
    if not constants.HF_HUB_OFFLINE:
        revision = hub.commit_of(parts["name"], revision, kind="dataset", advice=advice)
    import datasets  # takes about a second: after the hub has answered

    streaming = split["stop"] is not None and "%" not in split[0]
    place = name + split[0].removeprefix(split["name"])
    try:
        found = datasets.load_dataset(
            parts["name"],
            parts["config"],
            data_dir=parts["folder"],
            revision=revision,
            split=name if streaming else place,
            streaming=streaming,
        )
        if streaming:
            start = int(split["start"] or 0)
            found = found.skip(start).take(int(split["stop"]) - start)
        rows = [Row(f"{source} {place}:{number}", row) for number, row in enumerate(found, 1)]
    except Exception as error:  # the client's errors share no base class; none of them is hidden
        raise UserError(
            f"{source}: cannot be loaded from the Hugging Face hub ({hub.first_line(error)}); check name and split, "
            f"{advice}"
        ) from error
    return Content("hub data set", rows)


def _column(text: str) -> tuple[str, str]:
    ours, equals, theirs = text.partition("=")
    require(bool(ours and equals and theirs), f"--columns {text}: write ours=theirs, e.g. prompt=query")
    return ours, theirs


def _renamed(row: Row, columns: Sequence[tuple[str, str]]) -> Any:
    """The row's value with its fields under our names; a bare text is a message to answer, like a question."""
    if isinstance(row.value, str):
        return {"question": row.value}
    if not columns or not isinstance(row.value, dict):
        return row.value
    for ours, theirs in columns:
        there = f"there are {', '.join(map(str, row.value))}"
        require(theirs in row.value, f"{row.place}: no field {theirs!r} for --columns {ours}={theirs}; {there}")
    theirs = {name for _, name in columns}
    return {k: v for k, v in row.value.items() if k not in theirs} | {ours: row.value[name] for ours, name in columns}
