"""The README of a trained model's folder, `card.md`: what it was trained on, how, and with what result."""

from __future__ import annotations

from pathlib import Path

from minirlhf.files import read_json, write_text
from minirlhf.runs.log import read_rows

LOADERS = {
    "GPT2LMHeadModel": "AutoModelForCausalLM",
    "GPT2ForSequenceClassification": "AutoModelForSequenceClassification",
}


def write_model_card(folder: Path, *, script: str, objective: str) -> None:
    """Write README.md into a model's folder, from the `run.json` and `metrics.jsonl` of the stage it stands in.

    folder     runs/<name>/<stage>/model; all rows of the stage are on the disk
    script     the command that trained the model, e.g. "train_sft.py"
    objective  one sentence on what it was trained for
    """
    import jinja2  # when a stage has ended, and not by every script at its start

    stage, model = folder.parent, read_json(folder / "config.json")
    rows = read_rows(stage)
    environment = jinja2.Environment(trim_blocks=True, keep_trailing_newline=True)  # Markdown: nothing is escaped
    environment.filters["name"] = _name
    card = environment.from_string(Path(__file__).with_name("card.md").read_text(encoding="utf-8")).render(
        stage=stage.name,
        script=script,
        objective=objective,
        steps=len(rows),
        model=model,
        loader=LOADERS[model["architectures"][0]],
        run=read_json(stage / "run.json"),
        results={name: value for row in rows for name, value in row.items()},  # some are not measured at every step
    )
    write_text(folder / "README.md", card)


def _name(path: str, *, parts: int = 1) -> str:
    """The last parts of a path: no machine's folders are published."""
    return "/".join(Path(path).parts[-parts:])
