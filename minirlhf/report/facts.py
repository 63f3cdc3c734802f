"""What was run: settings, seeds, versions, times and the hashes of what was read, from each stage's run.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minirlhf.report.markup import Html, details, element, joined, section, table
from minirlhf.report.run import Run, StageRun

DIGITS = 12  # of a hash that are shown


def config(stage: StageRun) -> dict[str, Any]:
    """The stage's settings, none where run.json is missing."""
    return stage.setup.get("config", {})


def told(value: object) -> str:
    """A setting as text."""
    return ", ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)


def sources(stage: StageRun) -> Html:
    """What the stage read, each with the start of its SHA-256."""
    found = {**stage.setup.get("inputs", {}), **stage.setup.get("models", {})}
    items = [
        element("span", f"{short(path)} ", element("code", str(digest)[:DIGITS]), class_="source")
        for path, digest in found.items()
    ]
    return joined(items, " ")


def short(path: str) -> str:
    """The end of a path: a file's name, or `stage/model`."""
    parts = Path(path).parts
    return "/".join(parts[-2:]) if parts[-1:] == ("model",) else "/".join(parts[-1:]) or path


def words(values: dict[str, Any]) -> str:
    """`name value` of each."""
    return ", ".join(f"{name} {value}" for name, value in values.items())


def stages(run: Run) -> Html:
    """One row a stage."""
    rows = []
    for stage in run.stages:
        seconds = run.seconds.get(stage.name, stage.seconds)
        rows.append(
            (
                stage.name,
                "finished" if stage.finished else "not finished",
                len(stage.rows),
                f"{seconds:.0f} s",
                told(config(stage).get("seed", "")),
                sources(stage),
            )
        )
    return table(("stage", "state", "steps", "time", "seed", "read (SHA-256 of its content or weights)"), rows)


def versions(run: Run) -> str:
    """Versions and machine, once where all stages had the same."""
    found = dict.fromkeys(
        f"{words(stage.setup.get('versions', {}))}; {words(stage.setup.get('machine', {}))}"
        for stage in run.stages
        if stage.setup
    )
    return " / ".join(found)


def settings(run: Run) -> Html:
    """Every setting of every stage, folded away."""
    parts = []
    for stage in run.stages:
        if config(stage):
            rows = [(name, told(value)) for name, value in config(stage).items()]
            parts.append(details(f"Settings of {stage.name}", table(("setting", "value"), rows)))
    return joined(parts)


def differences(runs: Sequence[Run]) -> Html:
    """The settings in which the runs differ, one beside the other."""
    values: dict[str, list[str]] = {}
    for i, run in enumerate(runs):
        for stage in run.stages:
            for name, value in config(stage).items():
                values.setdefault(f"{stage.name}: {name}", [""] * len(runs))[i] = told(value)
    skipped = (": run", ": resume")
    rows = [(name, *found) for name, found in values.items() if len(set(found)) > 1 and not name.endswith(skipped)]
    if not rows:
        return element("p", "All settings are the same.", class_="quiet")
    return table(("setting", *(run.label for run in runs)), rows)


def facts(runs: Sequence[Run]) -> Html:
    """The section; several runs begin with what differs between them."""
    parts: list[Html] = []
    if len(runs) > 1:
        parts += [element("h3", "Settings that differ"), differences(runs)]
    for run in runs:
        parts += [element("h3", run.label), stages(run)]
        total = sum(run.seconds.values())
        time = f" All stages: {total:.0f} s." if total else ""
        parts += [element("p", f"{versions(run)}.{time}", class_="quiet"), settings(run)]
    return section("facts", "What was run", *parts)
