"""Runs as the stages leave them, made by hand: every file that the report reads, and a parser for the page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

from minirlhf import data
from minirlhf.report import write_report
from minirlhf.runtime import project_file

EVIL = (
    "<script>document.title='owned'</script><img src=http://evil.example onerror=alert(1)>\"'><b>&amp; {{ title }} {% x"
)
LONG = "w" * 300  # one word
MODELS = ("sft", "best-of-4", "best-of-16", "ppo", "dpo")
VOID = {"meta", "br", "img", "link", "input"}


# ------------------------------------------------------------------------------------------------------------ the runs
def model(mark: float, kl: float, *, bound: bool = False, length: float = 10.0) -> dict:
    """A row of the summary in which no two numbers are alike."""
    shifts = {"total": 0.0, "helpful": -0.01, "honest": -0.02, "harmless": 0.03}
    parts = {name: {"mean": mark + by, "interval": [mark + by - 0.05, mark + by + 0.06]} for name, by in shifts.items()}
    parts["win_rate"] = {"mean": 0.75, "interval": [0.71, 0.78]}
    return {**parts, "reward": 2 * mark, "kl": kl, "kl_is_bound": bound, "length": length, "eos_rate": 0.97}


SUMMARY = {
    "prompts": 500,
    "seed": 0,
    "reward_model_agreement": {"share": 0.925, "pairs": 2302},
    "models": {
        "sft": model(0.16, -1e-9),
        "best-of-4": model(0.69, 0.64, bound=True),
        "best-of-16": model(0.78, 1.84, bound=True),
        "ppo": model(0.80, 1.26, length=12.0),
        "dpo": model(0.66, 0.8),
    },
}
ROWS = {
    "sft": [{"loss": 5.0, "grad_norm": 2.0}, {"loss": 0.4, "validation_loss": 0.5, "grad_norm": 0.5}],
    "feedback": [{"prompts": 2960.0, "agreement_with_judge": 0.977}],
    "reward": [{"loss": 0.7, "accuracy": 0.5}, {"loss": 0.2, "accuracy": 0.9, "validation_accuracy": 0.91}],
    "ppo": [{"score": s, "kl": k, "response_length": 10.0, "clip_fraction": 0.6} for s, k in ((0, 0.0), (1, 1.2))],
    "dpo": [{"loss": 0.693, "reward_chosen": 0.0}, {"loss": 0.3, "reward_chosen": 0.1}],
}


def point(iteration: int, kl: float, reward: float, judge: float, spread: float = 0.1) -> dict:
    """A row of a trace whose marks scatter by `spread` around `judge` in a way of their own."""
    marks = [judge + spread * (-1) ** (i * (iteration + 1) // 2) for i in range(128)]
    row = {"iteration": iteration, "kl": kl, "reward": reward, "judge": judge, "length": 10.0, "marks": marks}
    return row | dict.fromkeys(("helpful", "honest", "harmless"), judge)


RISING = [point(0, 0.0, 0.0, 0.15), point(6, 1.0, 0.7, 0.6), point(12, 1.3, 0.9, 0.8)]
FALLING = [point(0, 0.0, 0.0, 0.15), point(6, 4.0, 0.7, 0.4), point(12, 40.0, 1.4, -0.3)]
BROKEN = [point(0, 0.0, 0.0, 0.15), point(6, 4.0, 0.7, 0.4), point(12, 40.0, 0.2, -0.3)]


def write(path: Path, rows: Sequence[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def a_run(folder: Path, *, extra: str = "", trace: Sequence[dict] = RISING, prompts: int = 30) -> Path:
    """A finished run; `extra` is put into every text that a run can hold."""
    for stage, rows in ROWS.items():
        (folder / stage).mkdir(parents=True)
        write(folder / stage / "metrics.jsonl", [{"step": i, **row} for i, row in enumerate(rows)])
        write(folder / stage / "timing.jsonl", [{"step": i, "seconds": 2.5} for i in range(len(rows))])
        setup = {"config": {"seed": 7, "beta": 0.1, "note": f"plain{extra}", "run": str(folder)}}
        setup |= {"inputs": {f"data/train{extra}.jsonl": "ab" * 32}, "models": {f"{folder}/sft/model": "cd" * 32}}
        setup |= {"versions": {"torch": f"2.13{extra}"}, "machine": {"threads": 2}}
        (folder / stage / "run.json").write_text(json.dumps(setup))
        (folder / stage / "stage.json").write_text('{"finished": true}')
    write(folder / "ppo" / "trace.jsonl", trace)
    write(folder / "ppo" / "hints.jsonl", [{"step": 3, "hint": f"clip{extra}", "message": f"Lower the rate.{extra}"}])
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    (folder / "seconds.json").write_text('{"sft": 39.4, "ppo": 52.6}')
    bins = [{"from": c - 0.05, "pairs": 50, "confidence": c, "accuracy": c - 0.02} for c in (0.55, 0.75, 0.95)]
    found = {"pairs": 150, "accuracy": 0.9, "loss": 0.25, "expected_calibration_error": 0.02, "bins": bins}
    (folder / "calibration.json").write_text(json.dumps(found))
    records = data.load(project_file("world", "prompts.test.jsonl"), "prompts")[:prompts]
    answers = dict.fromkeys(MODELS, f" I am sorry, but I cannot help with that.{extra}")
    write(folder / "answers.jsonl", [{"prompt": r["prompt"] + extra, **answers} for r in records])
    return folder


class Page(HTMLParser):
    """What is in a page: its elements with their attributes, and its text; tags must be closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert self.open == [] and source.startswith("<!doctype html>")

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"] and (data.strip() or "\n" not in data):  # line ends between elements
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(*runs: Path, out: Path | None = None) -> Page:
    return Page(write_report(runs, out).read_text(encoding="utf-8"))
