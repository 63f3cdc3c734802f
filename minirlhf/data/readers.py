"""One entry for all data: `load` takes a file or a name on the hub and gives the project's records.

What a source holds is found from its content. Bad lines stop a run; rows that say nothing (an empty response, chosen
equal to rejected, differing prompts, no label) are counted, said, and never trained on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minirlhf.data.containers import Dataset, read_file
from minirlhf.data.formats import FORMATS, KINDS, Format, Kind, Record, find, layout_of
from minirlhf.hf import hub
from minirlhf.runtime import UserError, require

# owner/name, then a folder in it, a configuration, a revision: Anthropic/hh-rlhf/helpful-base, openai/gsm8k:main
HUB_NAME = re.compile(
    r"(?P<name>\w[\w.-]*/\w[\w.-]*)(/(?P<folder>[\w./-]+))?(:(?P<config>[\w.-]+))?(@(?P<revision>\w+))?"
)
FILE_SUFFIX = re.compile(r".*\.(json|jsonl|gz|parquet|tsv|csv|txt)")  # of a missing file: the hub is not asked for it
SLICE = re.compile(r"(?P<name>\w*)(\[(?P<start>\d+%?)?:(?P<stop>\d+%?)?\])?")


def read_source(source: str | Path, split: str, columns: Sequence[str]) -> Dataset:
    """The rows of a file or hub name, sliced, with fields renamed ("ours=theirs")."""
    wanted = SLICE.fullmatch(split)
    if wanted is None:
        raise UserError(f"--split {split}: write a name, a slice or both, e.g. train, [:90%], test[1000:]")
    content = _read_hub(str(source), wanted) if is_hub_name(source) else _read_local(Path(source), wanted)
    names = dict(map(_column, columns))
    if not content.container.startswith("plain text"):
        content.rows = [(place, _renamed(place, value, names)) for place, value in content.rows]
    return content


def is_hub_name(source: str | Path) -> bool:
    """True for a name on the hub: it looks like one, and no file here has it."""
    text = str(source)
    named = isinstance(source, str) and HUB_NAME.fullmatch(text) is not None and FILE_SUFFIX.fullmatch(text) is None
    return named and not Path(text).exists()


def local_files(*sources: str | Path | None) -> tuple[Path, ...]:
    """Those of the sources that are files on this machine, whose hashes a run can keep."""
    return tuple(Path(source) for source in sources if source is not None and Path(source).is_file())


def _read_local(path: Path, split: re.Match[str]) -> Dataset:
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


def _read_hub(source: str, split: re.Match[str]) -> Dataset:
    """Rows of a data set on the hub. A slice that ends at a number is streamed: only what is read is downloaded."""
    from huggingface_hub import constants

    parts = HUB_NAME.fullmatch(source)
    assert parts is not None, source  # `is_hub_name` has said so
    advice = "or give a file: JSON Lines, JSON, TSV, Parquet or text"
    revision, name = parts["revision"], split["name"] or "train"
    if not constants.HF_HUB_OFFLINE:
        revision = hub.commit_of(parts["name"], revision, kind="dataset", advice=advice)
    import datasets  # takes about a second: after the hub has answered

    streaming = split["stop"] is not None and "%" not in split[0]
    place = name + split[0].removeprefix(split["name"])
    try:
        loaded = datasets.load_dataset(
            parts["name"],
            parts["config"],
            data_dir=parts["folder"],
            revision=revision,
            split=name if streaming else place,
            streaming=streaming,
        )
        if streaming:
            start = int(split["start"] or 0)
            loaded = loaded.skip(start).take(int(split["stop"]) - start)
        rows = [(f"{source} {place}:{number}", row) for number, row in enumerate(loaded, 1)]
    except Exception as error:  # the client's errors share no base class; none of them is hidden
        words = f"{source}: cannot be loaded from the Hugging Face hub ({hub.first_line(error)})"
        raise UserError(f"{words}; check name and split, {advice}") from error
    return Dataset("hub data set", rows)


def _column(text: str) -> tuple[str, str]:
    ours, equals, theirs = text.partition("=")
    require(bool(ours and equals and theirs), f"--columns {text}: write ours=theirs, e.g. prompt=query")
    return ours, theirs


def _renamed(place: str, value: Any, names: dict[str, str]) -> Any:
    """A row's value with its fields under our names; a bare text is a message to answer, like a question."""
    if isinstance(value, str):
        return {"question": value}
    if not isinstance(value, dict):
        return value
    for ours, theirs in names.items():
        there = f"there are {', '.join(map(str, value))}"
        require(theirs in value, f"{place}: no field {theirs!r} for --columns {ours}={theirs}; {there}")
    others = {name: field for name, field in value.items() if name not in names.values()}
    return others | {ours: value[theirs] for ours, theirs in names.items()}


SAMPLE = 100  # rows that decide which format a source has
CELL = r'(\w+|"[^"]*")'
TABLE = re.compile(rf"{CELL}([,;]{CELL})+\r?")  # names of columns, as CSV files begin


def load(source: str | Path, kind: Kind, *, split: str = "", columns: Sequence[str] = ()) -> list[Record]:
    """The records of a file or a hub name.

    kind     "pairs" (rankings too), "demonstrations" (of pairs: the chosen answers) or "prompts" (of anything)
    split    a split of a hub data set, and a slice of it or of a file: "train", "test[:1000]", "[10%:]"
    columns  "ours=theirs" for fields with other names, e.g. "prompt=query"
    Raises UserError that names file, line and reason where a line is bad, or where nothing is left to learn from.
    """
    dataset = read(source, kind, split=split, columns=columns)
    if dataset.bad:
        advice = f"`python -m minirlhf.data check {source}` lists them"
        raise UserError(f"{dataset.bad[0]} (bad lines: {len(dataset.bad)}; {advice})")
    require(len(dataset.records) > 0, f"{dataset.summary()}; nothing to learn from")
    if dataset.left_out:
        print(dataset.summary(), flush=True)
    return dataset.records


def read(source: str | Path, kind: Kind | None = None, *, split: str = "", columns: Sequence[str] = ()) -> Dataset:
    """Read a source whole, bad lines included; kind None takes the richest that it can give."""
    dataset = read_source(source, split, columns)
    dataset.source, dataset.kind = str(source), kind or "prompts"
    if dataset.container.startswith("plain text"):
        _plain_text(dataset, kind)
    elif dataset.rows:
        _parse(dataset, *_detect(dataset, kind))
    else:
        require(bool(dataset.bad), f"{source}: holds no records")
    return dataset


# ------------------------------------------------------------------------------------------------------------ records
def _detect(dataset: Dataset, kind: Kind | None) -> tuple[Format, Kind]:
    """The format that fits most of the first rows and can give `kind`; without a kind, the richest."""
    sample = dataset.rows[:SAMPLE]
    for wanted in (kind,) if kind else KINDS:
        able = [form for form in FORMATS if wanted in form.kinds]
        counts = [sum(form.fits(value) for _, value in sample) for form in able]
        best = max(counts)
        if best and (kind or best * 2 >= len(sample)):
            return able[counts.index(best)], wanted
    place, value = next((row for row in sample if isinstance(row[1], dict)), sample[0])
    there = f"the fields {', '.join(map(str, value))}" if isinstance(value, dict) else "a value without fields"
    raise UserError(
        f"{place}: {f'no {kind}' if kind else 'nothing'} can be read from {there}; name the fields that hold them, "
        f"e.g. --columns prompt=query response=reply, or give a file with prompt and response, or prompt, chosen and "
        f"rejected"
    )


def _parse(dataset: Dataset, form: Format, kind: Kind) -> None:
    """The records of a kind in rows of a format."""
    layout = layout_of([value for _, value in dataset.rows if isinstance(value, dict)])

    def read_row(row: dict[str, Any]) -> list[Record]:
        for need in form.needs:
            find(row, need)
        return form.read(row, kind, layout)

    dataset.format, dataset.kind = form.name, kind
    dataset.records = dataset.parse(read_row)
    if kind == "prompts" and form.kinds != ("prompts",):
        distinct = list(dict.fromkeys(record["prompt"] for record in dataset.records))
        dataset.left_out["a prompt that came before"] += len(dataset.records) - len(distinct)
        dataset.records = [{"prompt": prompt} for prompt in distinct]
    elif kind == "demonstrations" and "pairs" in form.kinds:
        dataset.format += " (their chosen answers)"
        dataset.records = [{"prompt": r["prompt"], "response": r["chosen"]} for r in dataset.records]
    dataset.left_out = +dataset.left_out  # without reasons that never held


def _plain_text(dataset: Dataset, kind: Kind | None) -> None:
    """All lines as one text without a prompt."""
    first = dataset.rows[0][0] if dataset.rows else dataset.source
    if dataset.rows and TABLE.fullmatch(dataset.rows[0][1]):
        raise UserError(f"{first}: looks like CSV, which is not read; save it as TSV or JSON Lines")
    require(kind in (None, "demonstrations"), f"{first}: plain text, which holds no {kind}; give a file with fields")
    text = "\n".join(line.removesuffix("\r") for _, line in dataset.rows)
    dataset.format, dataset.kind = "one text", "demonstrations"
    dataset.records = [{"prompt": "", "response": text}] if text.strip() else []
