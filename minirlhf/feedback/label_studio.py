"""Label Studio, a labelling server: pairs out as its tasks, people's choices in from its export.

    python -m minirlhf.feedback export       # <run>/labels/label-studio.json, to upload as tasks
    python -m minirlhf.feedback import --export downloaded.json      # to <run>/labels/label-studio.jsonl

A task holds `prompt`, `answer1` (left) and `answer2` (right) to read, and the exact texts under `source`, which come
back in the export, so that nothing has to be looked up. Tasks of other origin, without `source`, are read too. The
project's labelling interface in Label Studio:

    <View>
      <Text name="prompt" value="$prompt"/>
      <View style="display: grid; grid-template-columns: 1fr 1fr; gap: 1em">
        <Text name="answer1" value="$answer1"/>
        <Text name="answer2" value="$answer2"/>
      </View>
      <Pairwise name="comparison" toName="answer1,answer2"/>
    </View>

Its JSON export has an annotation's `selected: left | right` under `result`, the short one (JSON-MIN) beside the texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minirlhf.config import Settings
from minirlhf.data.formats import FORMATS, BadRow, as_answer, list_of, text_of, value_of
from minirlhf.feedback.labels import Candidates, Label, Row, new_file, parse_candidates, ranks_of, read_lines
from minirlhf.feedback.tasks import Task, TaskConfig, make_tasks
from minirlhf.files import write_json, write_records
from minirlhf.runtime import UserError, require

LAYOUTS = [form for form in FORMATS if form.name.startswith("Label Studio")]  # of one reader


@dataclass
class ExportConfig(TaskConfig):
    output: Path | None = None
    """File to write, by default `<run>/labels/label-studio.json`; an existing one is never overwritten."""


@dataclass
class ImportConfig(Settings):
    run: Path = Path("runs/tiny")
    """Folder of the run; writes into `<run>/labels`."""
    export: Path | None = None
    """The file that Label Studio exported, JSON or JSON-MIN."""
    output: Path | None = None
    """File of labels, by default `<run>/labels/label-studio.jsonl`; an existing one is never overwritten."""


def export_tasks(config: ExportConfig) -> Path:
    """Write a pair a task as a JSON array; returns the file."""
    output = new_file(config.output or config.run / "labels" / "label-studio.json")
    tasks = make_tasks(config, "label-studio")
    rows = []
    for task in tasks:
        left, right = (answer.strip() for answer in task.answers)
        source = {**task.candidates.record(), "shown": task.shown}
        rows.append({"data": {"prompt": task.question, "answer1": left, "answer2": right, "source": source}})
    write_json(output, rows)
    print(f"{output}: {len(tasks)} tasks")
    return output


def import_labels(config: ImportConfig) -> Path:
    """Write the choices of an export as labels; returns the file."""
    if config.export is None:
        raise UserError("import: name the exported file with --export")
    output = new_file(config.output or config.run / "labels" / "label-studio.jsonl")
    labels, left_out = read_lines(config.export, task_labels)
    require(len(labels) > 0, f"{config.export}: no task in it is labelled")
    write_records(output, [label.record() for label in labels])
    print(f"{output}: {len(labels)} labels" + "".join(f", {n} tasks left out: {why}" for why, n in left_out.items()))
    return output


def task_labels(row: Row) -> list[Label]:
    """A label for every choice that was made in a task; raises LeftOut where there is none, BadRow for a bad task."""
    words = "not a task of Label Studio: it needs prompt, answer1 and answer2, under 'data' or by themselves"
    require(any(form.fits(row) for form in LAYOUTS), words, BadRow)
    data = row.get("data", row)
    labels = []
    for pair in LAYOUTS[0].read(row, "pairs", "messages"):
        left, right = (as_answer(text_of(data, name)) for name in ("answer1", "answer2"))
        task = _task(data) if "source" in data else Task(Candidates(pair["prompt"], (left, right)), (0, 1))
        side = "left" if pair["chosen"] == left else "right"
        labels.append(task.label(_name(pair.get("labeller")), ranks_of(side, task.shown)))
    return labels


def _task(data: Row) -> Task:
    """The task that `export_tasks` put there; raises BadRow where its texts are not those that were read."""
    source = value_of(data, "source", dict, "an object; export the tasks anew")
    task = Task(parse_candidates(source), tuple(list_of(source, "shown", 2)))
    texts = [text_of(data, name).strip() for name in ("answer1", "answer2")]
    if sorted(task.shown) != [0, 1] or [answer.strip() for answer in task.answers] != texts:
        raise BadRow("'answer1' and 'answer2' are not the responses under 'source'; export the tasks anew")
    return task


def _name(labeller: object) -> str:
    """The annotator, whom exports name by number, by address, or not at all."""
    if isinstance(labeller, dict):
        labeller = labeller.get("email") or labeller.get("id")
    return "label-studio" if labeller is None else f"label-studio {labeller}"
