"""The README of a trained model's folder: what it was trained on, how, and with what result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minirlhf.files import write_text
from minirlhf.runs.log import read_rows

LOADERS = {
    "GPT2LMHeadModel": "AutoModelForCausalLM",
    "GPT2ForSequenceClassification": "AutoModelForSequenceClassification",
}
NOT_RESULTS = ("step", "grad_norm", "learning_rate")


def write_model_card(folder: Path, *, script: str, objective: str) -> None:
    """Write README.md into a model's folder, from the `run.json` and `metrics.jsonl` of the stage it stands in.

    folder     runs/<name>/<stage>/model; all rows of the stage are on the disk
    script     the command that trained the model, e.g. "train_sft.py"
    objective  one sentence on what it was trained for
    """
    stage = folder.parent
    run = json.loads((stage / "run.json").read_text(encoding="utf-8"))
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rows = read_rows(stage)
    lines = [
        "---",
        "library_name: transformers",
        "tags: [minirlhf, rlhf, gpt2]",
        "---",
        f"# {stage.name}: a GPT-2 trained with minirlhf",
        "",
        f"{objective} Trained by `{script}` of minirlhf for {len(rows)} steps. {_shape(settings)}",
        "",
        *_loading(settings["architectures"][0]),
        "",
        "## Data",
        "",
        *(f"- {Path(name).name}, SHA-256 {value}" for name, value in run["inputs"].items()),
        *(f"- starts from {'/'.join(Path(name).parts[-2:])}, SHA-256 {value}" for name, value in run["models"].items()),
        *([] if run["inputs"] else ["- named in the configuration below"]),
        "",
        "## Results, last values of the run",
        "",
        *_table((name, f"{value:.4g}") for name, value in _last(rows).items() if name not in NOT_RESULTS),
        "",
        "## Configuration",
        "",
        *_table((name, _plain(value)) for name, value in run["config"].items()),
        "",
        "Versions: " + ", ".join(f"{name} {value}" for name, value in run["versions"].items()) + ".",
        "",
    ]
    write_text(folder / "README.md", "\n".join(lines))


def _last(rows: list[dict[str, float]]) -> dict[str, float]:
    """The last value of each metric; some are not measured at every step."""
    return {name: value for row in rows for name, value in row.items()}


def _shape(settings: dict[str, Any]) -> str:
    sizes = f"{settings['n_layer']} layers, {settings['n_head']} heads, {settings['n_embd']} channels"
    return f"{sizes}, {settings['n_positions']} tokens of context, vocabulary of {settings['vocab_size']}."


def _loading(architecture: str) -> list[str]:
    loader = LOADERS[architecture]
    return [
        "```python",
        f"from transformers import {loader}, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        f'model = {loader}.from_pretrained("FOLDER")',
        "```",
        "",
        "Prompts have the form `\\n\\nHuman: …\\n\\nAssistant:` where the data are dialogues; a response ends with "
        "`<|endoftext|>`. Rows are not padded on the left.",
    ]


def _table(rows: Any) -> list[str]:
    return ["| name | value |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]


def _plain(value: Any) -> str:
    """A setting as text; of a full path the name alone: no machine's folders are published."""
    text = str(value)
    return Path(text).name if text.startswith("/") else text
