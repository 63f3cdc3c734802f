"""The pages in docs/: every name on them exists, every logged number is explained, and their Python runs.

`python tests/test_docs.py --write` copies the ranges and advice of healthy.csv into the tables of docs/metrics.md.
"""

from __future__ import annotations

import ast
import csv
import functools
import json
import re
import sys
from pathlib import Path

import pytest
import test_imports
import tiny

import train_dpo
from minirlhf import online_dpo
from minirlhf.data import readers
from minirlhf.evaluate import comparison, evaluation
from minirlhf.runs.health import HEALTHY

ROOT = Path(__file__).parent.parent
PAGES = sorted(page for folder in ("docs", "studies", "benchmarks") for page in (ROOT / folder).glob("*.md"))
CHAPTERS = [page for page in PAGES if page.name[0].isdigit()]
METRICS = ROOT / "docs" / "metrics.md"
ROW = re.compile(r"\| (`\w+`(?:, `\w+`)*) \| ((?:[^|\\]|\\.)+) \|.*")  # names and meaning, then what healthy.csv says


# ------------------------------------------------------------------------------------------------------ logged numbers
def files_of(heading: str) -> tuple[str, ...]:
    """The files that a heading of the page names."""
    return tuple(re.findall(r"`([\w/.-]+\.jsonl?)`", heading))


def explained() -> dict[tuple[str, ...], set[str]]:
    """The names on the page of metrics, by the files that the heading above them names."""
    found: dict[tuple[str, ...], set[str]] = {}
    for section in METRICS.read_text(encoding="utf-8").split("\n## ")[1:]:
        heading, *lines = section.splitlines()
        names = [name for line in lines if (row := ROW.fullmatch(line)) for name in re.findall(r"\w+", row[1])]
        assert len(set(names)) == len(names), f"a name twice under {heading}"
        if files := files_of(heading):
            found[files] = set(names)
    return found


def kind_of(files: tuple[str, ...]) -> str:
    """The name that healthy.csv has for what is logged in these files."""
    return re.split(r"[./]", "".join(files[:1]))[0]


def with_ranges(page: str) -> str:
    """The page with the ranges and the advice of healthy.csv in its tables; advice given above in a table is named."""
    kind, above, columns, lines = "", {}, 0, []
    for line in page.splitlines():
        if line.startswith("## "):
            kind, above = kind_of(files_of(line)), {}
        if line.startswith("| name |"):
            columns = line.count("|") - 1
        if row := ROW.fullmatch(line):
            names = re.findall(r"\w+", row[1])
            found = [HEALTHY[kind, name] for name in names if (kind, name) in HEALTHY]
            healthy = {(f"**{metric}**" if str(metric) else "", metric.advice) for metric in found}
            assert len(healthy) <= 1, f"{row[1]}: a row each, they differ in range or advice"
            ((bold, advice),) = healthy or {("", "")}
            cells = [row[1], row[2], bold, f"as `{above[advice]}`" if advice in above else advice]
            above |= {advice: above.get(advice, names[0])} if advice else {}
            line = f"| {' | '.join(cells[: max(columns, 2)])}".rstrip(" |") + " |"
        lines.append(line)
    return "\n".join(lines) + "\n"


def logged(file: Path) -> set[str]:
    return {name for line in file.read_text().splitlines() for name in json.loads(line)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, with PPO a second time under the settings that log something more, and an evaluation."""
    stages = ("sft", "feedback", "reward", "ppo", "dpo")
    run = tiny.copy_of(tiny.finished_run(), tmp_path_factory.mktemp("docs") / "run", *stages)
    more = {"kl_in": "loss", "ptx_data": str(run / "train.jsonl"), "ptx_coefficient": 0.1}
    tiny.run_stage("ppo", run, stage="ppo-more", iterations=1, **more)
    online_dpo.main(tiny.online_dpo_config(run))
    settings = {"prompts": run / "prompts.jsonl", "max_prompts": 4, "best_of": (2,), "max_new_tokens": tiny.LONGEST}
    evaluation.main(evaluation.Config(run=run, device="cpu", **settings))
    judges = {"judge": "world", "judge_model": str(run / "sft"), "reward_model": str(run / "reward")}
    settings |= {"models": (str(run / "sft"), str(run / "ppo")), "prompts": str(run / "prompts.jsonl")} | judges
    settings.pop("best_of")
    comparison.main(comparison.Config(out=run / "comparison", device="cpu", **settings))
    return run


def numbers(run: Path) -> dict[str, set[str]]:
    """The names of all numbers that a run's files hold, by file, as the page of metrics has them."""
    rows = {stage: logged(run / stage / "metrics.jsonl") for stage in ("sft", "feedback", "reward", "ppo", "dpo")}
    rows["ppo"] |= logged(run / "ppo-more" / "metrics.jsonl")
    found = {f"{stage}/metrics.jsonl": names - {"step"} for stage, names in rows.items()}
    found["online-dpo/metrics.jsonl"] = logged(run / "online-dpo" / "metrics.jsonl") - {"step"}
    found["metrics.jsonl"] = set.intersection(*rows.values())
    found["timing.jsonl"] = logged(run / "sft" / "timing.jsonl")
    found["reward/normalisation.json"] = set(json.loads((run / "reward" / "normalisation.json").read_text())["after"])
    summary = json.loads((run / "summary.json").read_text())
    found["summary.json"] = set(summary) | {name for row in summary["models"].values() for name in row}
    compared = json.loads((run / "comparison" / "comparison.json").read_text())
    models = compared["models"].values()
    found["comparison.json"] = set(compared) | {name for m in models for name in [*m, *m["judge_model"]]}
    return found


def test_the_page_of_metrics_explains_what_is_logged_and_nothing_else(run: Path) -> None:
    there = numbers(run)
    for files, names in explained().items():
        logged_there = set.union(*(there.pop(file) for file in files))
        assert logged_there - names == set(), f"{files}: logged and not explained"
        assert names - logged_there == set(), f"{files}: explained and not logged"
    assert not there


def test_ranges_and_advice_are_those_of_the_table() -> None:
    page = METRICS.read_text(encoding="utf-8")
    assert page == with_ranges(page), "python tests/test_docs.py --write"
    places = {(kind_of(files), name) for files, names in explained().items() for name in names}
    assert {place for place, metric in HEALTHY.items() if str(metric)} <= places


# --------------------------------------------------------------------------------------------------------------- names
@functools.cache
def defined(file: Path) -> set[str]:
    """The functions, classes, methods and module-level names of a source file."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return names


def code_names(page: Path) -> list[tuple[str, str]]:
    """Each `file.py: name` of a page."""
    return re.findall(r"`([\w/.-]+\.py): ([\w.]+)`", page.read_text(encoding="utf-8"))


def test_every_function_and_test_that_a_page_names_exists() -> None:
    for page in PAGES:
        for file, name in code_names(page):
            assert (ROOT / file).is_file(), f"{page.name}: no file {file}"
            assert name in defined(ROOT / file), f"{page.name}: {file} has no {name}"


def test_every_file_that_a_page_or_a_module_names_exists() -> None:
    """The log and the changelog tell of what was; the list of features says what moved, and where to."""
    files = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "data/README.md")]
    files += [page for page in PAGES if page.name != "log.md"] + list(ROOT.glob("*.py"))
    files += [module for folder in ("minirlhf", "benchmarks", "studies") for module in (ROOT / folder).rglob("*.py")]
    path = re.compile(r"\b(?:minirlhf|benchmarks|studies|tests|docs)/[\w/.-]+\.(?:py|md)\b")
    for file in files:
        for named in path.findall(file.read_text("utf-8")):
            assert (ROOT / named).is_file(), f"{file.relative_to(ROOT)}: no file {named}"


def test_every_row_of_the_equations_names_code() -> None:
    lines = (ROOT / "docs" / "equations.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith(("| equation", "| ---"))]
    for row in rows:
        function, test = re.findall(r"`([\w/.-]+\.py): ([\w.]+)`", row)
        assert not function[0].startswith("tests/") and test[0].startswith("tests/test_"), row
        assert f"({'../' + function[0]})" in row, f"the link leads elsewhere: {row}"


def test_every_loss_has_its_row() -> None:
    named = {name for file, name in code_names(ROOT / "docs" / "equations.md") if file.startswith("minirlhf/")}
    for module in ("dpo", "bradley_terry", "ppo"):
        losses = {name for name in defined(ROOT / "minirlhf" / f"{module}.py") if name.endswith("_loss")}
        assert losses <= named, f"{module}: {losses - named} not in equations.md"


def test_links_lead_somewhere() -> None:
    for page in (*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            path, _, anchor = target.partition("#")
            if path.startswith("http"):
                continue
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), f"{page.name}: {target} leads nowhere"
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.M) if anchor else []
            slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert not anchor or anchor in slugs, f"{page.name}: {target} has no such heading"


def test_the_floors_of_the_design_are_those_of_the_imports() -> None:
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    assert [set(line.split()) for line in page.split("```")[1].strip().splitlines()] == test_imports.FLOORS[::-1]


def test_the_map_of_the_readme_has_every_room() -> None:
    rows = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Where things are")[2].splitlines()
    told = {name for row in rows if row.startswith("| `") for name in re.findall(r"`([\w/.]+)`", row.split("|")[1])}
    rooms = {p.name if p.is_file() else f"{p.name}/" for p in (ROOT / "minirlhf").iterdir() if p.name[0] != "_"}
    assert rooms - told == set() and {"studies/", "benchmarks/", "tests/", "data/", "docs/"} <= told


def numbers_of(text: str) -> set[float]:
    """All numbers of a text, without their signs."""
    return {float(number.replace(",", "")) for number in re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", text)}


def test_every_figure_of_the_readmes_results_stands_on_the_page_beside_it() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Results")[2].partition("\n## ")[0]
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| ") and "](" in line]
    assert len(rows) >= 10
    for _, what, result, page, _ in rows:
        target = re.search(r"\]\(([^)#]+)", page)[1]
        missing = numbers_of(result) - numbers_of((ROOT / target).read_text(encoding="utf-8"))
        assert not missing, f"{what.strip()}: {missing} not in {target}"


def test_the_table_of_label_counts_is_that_of_the_csv() -> None:
    results = ROOT / "benchmarks" / "results" / "2026-11-21-label-count.csv"
    seeds: dict[tuple[str, ...], list[float]] = {}
    for row in csv.DictReader(results.read_text(encoding="utf-8").splitlines()):
        key = tuple(row[name] for name in ("experiment", "kind", "labels", "noise"))
        seeds.setdefault(key, []).append(100 * float(row["agreement"]))
    page = (ROOT / "docs" / "feedback.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .+ \| ([\d.]+ %) \| ([\d.]+, [\d.]+, [\d.]+) \|$", page, re.M)
    assert rows == [(f"{sum(v) / 3:.1f} %", ", ".join(f"{x:.1f}" for x in v)) for v in seeds.values()]


def test_the_reading_list_of_the_readme_knows_how_long_a_file_is() -> None:
    rows = re.findall(r"^\d+\. `([\w/.]+)`, (\d+) lines, (\d+) minutes", (ROOT / "README.md").read_text("utf-8"), re.M)
    assert len(rows) == 10
    for file, lines, minutes in rows:
        there = len((ROOT / file).read_text(encoding="utf-8").splitlines())
        assert abs(int(lines) - there) <= max(10, 0.1 * there), f"{file}: {there} lines"
        assert abs(int(minutes) - there / 15) <= 5, f"{file}: 15 lines a minute"


# ------------------------------------------------------------------------------------------------------------- figures
def figures(row: str) -> list[str]:
    """The numbers of a row of a table."""
    return re.findall(r"(?<![\w.-])[-+]?\d+(?:[.,]\d+)*(?:e-?\d+)?", row)


def is_part(some: list[str], others: list[str]) -> bool:
    """`some` stand among `others` in the same order."""
    rest = iter(others)
    return all(figure in rest for figure in some)


def test_a_table_of_results_is_that_of_the_file_named_above_it() -> None:
    """The numbers of a row stand in the same order in one row of the file that was named last in the section."""
    checked = 0
    for page in (*CHAPTERS, *sorted((ROOT / "studies").glob("*.md")), ROOT / "docs" / "feedback.md"):
        results: list[list[str]] = []
        for line in page.read_text(encoding="utf-8").splitlines():
            if line.startswith("## "):
                results = []
            for name in re.findall(r"benchmarks/results/[\w-]+\.md", line):
                results = [figures(row) for row in (ROOT / name).read_text(encoding="utf-8").splitlines()]
            if line.startswith("|") and results and figures(line):
                assert any(is_part(figures(line), row) for row in results), f"{page.name}: not in the file: {line}"
                checked += 1
    assert checked >= 50


# ------------------------------------------------------------------------------------------------------------ chapters
def test_chapters_are_numbered_and_linked_in_reading_order() -> None:
    assert [page.name[0] for page in CHAPTERS] == [str(n) for n in range(1, 7)]
    for page, following in zip(CHAPTERS, CHAPTERS[1:], strict=False):
        assert f"]({following.name})" in page.read_text(encoding="utf-8").splitlines()[-1], (
            f"{page.name} ends elsewhere"
        )


@pytest.mark.parametrize("page", CHAPTERS, ids=lambda page: page.stem)
def test_a_chapter_has_its_parts_and_takes_a_quarter_of_an_hour(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    parts = ("The objective", "The equation", "Where it is", "What to watch", "What goes wrong", "Exercises")
    headings = re.findall(r"^## (.+)$", text, re.M)
    assert [h for h in headings if h in parts] == list(parts)
    assert text.count("<summary>Solution</summary>") == 2
    assert len(text.split()) < 15 * 150, "at 150 words a minute, which is slow, because there is mathematics in it"


# ------------------------------------------------------------------------------------------------------- code that runs
def python_blocks(page: Path) -> list[tuple[int, str]]:
    """The Python blocks of a page with the lines they begin at."""
    text = page.read_text(encoding="utf-8")
    return [(text[: m.start()].count("\n") + 1, m[1]) for m in re.finditer(r"```python\n(.*?)```", text, re.S)]


@pytest.mark.parametrize("page", [*CHAPTERS, ROOT / "docs" / "extending.md"], ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.copy_of(tiny.finished_run(), tmp_path / "runs" / "tiny", "sft", "feedback", "reward")
    monkeypatch.chdir(tmp_path)
    for module, name in ((train_dpo, "dpo_loss"), (readers, "FORMATS")):
        monkeypatch.setattr(module, name, getattr(module, name))  # what the page replaces comes back
    namespace: dict[str, object] = {"__name__": page.stem}
    for line, block in python_blocks(page):
        exec(compile("\n" * line + block, str(page), "exec"), namespace)
    if page.stem == "extending":
        assert logged(Path("runs/tiny/dpo-positive/metrics.jsonl"))


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    METRICS.write_text(with_ranges(METRICS.read_text(encoding="utf-8")), encoding="utf-8")
