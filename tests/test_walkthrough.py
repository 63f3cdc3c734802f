"""The walk-through notebook is that of its script, and every cell of it runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

DOCS = Path(__file__).parent.parent / "docs"


def maker() -> ModuleType:
    specification = importlib.util.spec_from_file_location("make_walkthrough", DOCS / "make_walkthrough.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_notebook_is_that_of_the_script() -> None:
    made = maker().notebook((DOCS / "walkthrough.py").read_text(encoding="utf-8"))
    kept = nbformat.read(DOCS / "walkthrough.ipynb", as_version=4)
    assert [(cell.id, cell.cell_type, cell.source) for cell in kept.cells] == [
        (cell.id, cell.cell_type, cell.source) for cell in made.cells
    ]
    nbformat.validate(kept)


def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a small size, in a kernel of its own; an error in a cell is an error here."""
    monkeypatch.setenv("MINIRLHF_WALKTHROUGH", "small")
    monkeypatch.setenv("PYTHONPATH", str(DOCS.parent))
    module = maker()
    made = module.notebook((DOCS / "walkthrough.py").read_text(encoding="utf-8"))
    module.execute(made, tmp_path)
    outputs = [output for cell in made.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [o for o in outputs if o.output_type == "display_data" and "image/png" in o.data]
    assert len(pictures) == 5
    assert (tmp_path / "runs" / "walkthrough" / "summary.json").is_file()
