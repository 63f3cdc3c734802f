"""Label Studio: tasks out, choices in, and nothing lost on the way."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from labelling import write_candidates

from minirlhf import data
from minirlhf.data.formats import message_prompt
from minirlhf.feedback.label_studio import ExportConfig, ImportConfig, export_tasks, import_labels, task_labels
from minirlhf.feedback.labels import Candidates, Label, read_labels, read_lines
from minirlhf.feedback.tasks import Task
from minirlhf.runtime import UserError

EXPORTED = Path(__file__).parent / "files" / "label-studio.json"


def test_an_export_by_hand() -> None:
    labels, left_out = read_lines(EXPORTED, task_labels)
    lion, seal = message_prompt("What does the lion eat?"), message_prompt("Where does the seal live?")
    lions, seals = (" The lion eats meat.", " Find out for yourself."), (" In the jungle.", " In the sea.")
    assert labels == [
        Label(lion, lions, (0, 1), "left", labeller="label-studio 1", shown=(0, 1)),
        Label(lion, lions, (1, 0), "right", labeller="label-studio ben@example.org", shown=(0, 1)),
        Label(seal, seals, (1, 0), "right", labeller="label-studio 1", shown=(0, 1)),
    ]
    assert left_out == {"not labelled": 1}


def test_the_short_export(tmp_path: Path) -> None:
    """JSON-MIN: the choice stands beside the texts, under the name of its control."""
    row = {
        "id": 1,
        "prompt": "Why?",
        "answer1": "a",
        "answer2": "b",
        "comparison": {"selected": "right"},
        "annotator": 3,
    }
    (tmp_path / "e.json").write_text(json.dumps([row]))
    (label,), _ = read_lines(tmp_path / "e.json", task_labels)
    assert label == Label(
        message_prompt("Why?"), (" a", " b"), (1, 0), "right", labeller="label-studio 3", shown=(0, 1)
    )


def annotate(tasks: list[dict], sides: str) -> list[dict]:
    words = {"l": "left", "r": "right"}
    return [
        {**task, "annotations": [{"completed_by": 7, "result": [{"value": {"selected": words[side]}}]}]}
        for task, side in zip(tasks, sides, strict=True)
    ]


def test_what_goes_out_comes_back_with_ids_sources_and_sides(tmp_path: Path) -> None:
    made = {c.prompt: c for c in write_candidates(tmp_path / "c.jsonl", prompts=8, count=3)}
    file = export_tasks(ExportConfig(run=tmp_path, candidates=tmp_path / "c.jsonl"))
    tasks = json.loads(file.read_text())
    assert len(tasks) == 8 and {task["data"]["prompt"] for task in tasks} == {f"Question {i}?" for i in range(8)}
    lefts = [task["data"]["source"]["shown"] == [0, 1] for task in tasks]
    assert 0 < sum(lefts) < 8, "which is on the left is random"
    (tmp_path / "e.json").write_text(json.dumps(annotate(tasks, "lrlrrlll")))
    labels = read_labels(import_labels(ImportConfig(run=tmp_path, export=tmp_path / "e.json")))
    for task, label, side in zip(tasks, labels, "lrlrrlll", strict=True):
        chosen = task["data"]["answer1" if side == "l" else "answer2"]
        assert label.responses[label.ranks.index(0)] == f" {chosen}" and label.verdict[0] == side
        assert label.responses[label.shown[0]] == f" {task['data']['answer1']}"
        whole = made[label.prompt]
        for text, ids, source in zip(label.responses, label.response_ids, label.sources, strict=True):
            k = whole.responses.index(text)
            assert ids == whole.response_ids[k] and source == whole.sources[k]
    assert all(label.labeller == "label-studio 7" for label in labels)
    assert [x.item for x in labels] == [Candidates(x.prompt, x.responses).item for x in labels]


def test_what_goes_out_is_read_by_the_training_scripts_reader_too(tmp_path: Path) -> None:
    write_candidates(tmp_path / "c.jsonl", prompts=3)
    tasks = json.loads(export_tasks(ExportConfig(run=tmp_path, candidates=tmp_path / "c.jsonl")).read_text())
    (tmp_path / "e.json").write_text(json.dumps(annotate(tasks, "lrl")))
    pairs = data.load(tmp_path / "e.json", "pairs")
    labels, _ = read_lines(tmp_path / "e.json", task_labels)
    assert [(p["prompt"], p["chosen"]) for p in pairs] == [(x.prompt, x.responses[x.ranks.index(0)]) for x in labels]


@pytest.mark.parametrize(
    "prompt, question",
    [
        ("\n\nHuman: Why?\n\nAssistant:", "Why?"),
        (
            "\n\nHuman: Why?\n\nAssistant: So.\n\nHuman: Oh?\n\nAssistant:",
            "Human: Why?\n\nAssistant: So.\n\nHuman: Oh?\n\nAssistant:",
        ),
        ("Once upon a time", "Once upon a time"),
        ("\n\nHuman: a\n\nHuman: b\n\nAssistant:", "Human: a\n\nHuman: b\n\nAssistant:"),
    ],
)
def test_the_question_that_people_read(prompt: str, question: str) -> None:
    assert Task(Candidates(prompt, (" a", " b")), (0, 1)).question == question


def changed(**changes: object) -> dict:
    source = {"prompt": "p", "responses": [" a", " b"], "shown": [1, 0]}
    task = {"prompt": "p", "answer1": "b", "answer2": "a", "source": source}
    selected = changes.pop("selected", "left")
    return {"data": {**task, **changes}, "annotations": [{"result": [{"value": {"selected": selected}}]}]}


@pytest.mark.parametrize(
    "row, words",
    [
        (changed(selected="middle"), "selected is 'middle'; it must be left or right"),
        (changed(answer1="c"), "'answer1' and 'answer2' are not the responses under 'source'"),
        (changed(source=[1]), "the field 'source' is a list, not an object; export the tasks anew"),
        (changed(source={"prompt": "p", "responses": [" a"], "shown": [0]}), "1 responses; a comparison needs"),
        (changed(source={"prompt": "p", "responses": [" a", " b"]}), "no field 'shown'"),
        (changed(source={"prompt": "p", "responses": [" a", " b"], "shown": [0, 0]}), "are not the responses"),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "not a task of Label Studio"),
        ({"data": [], "annotations": []}, "the field 'data' is a list, not an object"),
        (changed() | {"annotations": "none"}, "the field 'annotations' is a text, not a list"),
    ],
)
def test_bad_exports_are_named_with_their_line(row: dict, words: str, tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    path.write_text(f"[{json.dumps(changed())},\n{json.dumps(row)}]")
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}:2: .*{re.escape(words)}"):
        read_lines(path, task_labels)


def test_nothing_is_overwritten_and_nothing_empty_is_written(tmp_path: Path) -> None:
    write_candidates(tmp_path / "c.jsonl", prompts=2)
    config = ExportConfig(run=tmp_path, candidates=tmp_path / "c.jsonl")
    export_tasks(config)
    with pytest.raises(UserError, match="exists already"):
        export_tasks(config)
    (tmp_path / "e.json").write_text(json.dumps([{**changed(), "annotations": []}]))
    with pytest.raises(UserError, match="no task in it is labelled"):
        import_labels(ImportConfig(run=tmp_path, export=tmp_path / "e.json"))
    with pytest.raises(UserError, match="--export"):
        import_labels(ImportConfig(run=tmp_path))
    with pytest.raises(UserError, match="make it with"):
        export_tasks(ExportConfig(run=tmp_path / "none"))
