"""Make docs/walkthrough.ipynb from docs/walkthrough.py.

    python docs/make_walkthrough.py              # without outputs, at once
    python docs/make_walkthrough.py --execute    # with them: runs the pipeline, about four minutes on two cores

In the script `# %%` begins a cell of code and `# %% [markdown]` one of text, whose lines are comments.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

SOURCE = Path(__file__).with_name("walkthrough.py")
TEXT = " [markdown]"


def notebook(source: str) -> nbformat.NotebookNode:
    """The script's cells as a notebook; the same script always gives the same bytes."""
    cells = []
    for number, cell in enumerate(source.split("# %%")[1:]):
        body = cell.removeprefix(TEXT).strip("\n")
        if cell.startswith(TEXT):
            lines = [line.removeprefix("#").removeprefix(" ") for line in body.split("\n")]
            made = nbformat.v4.new_markdown_cell("\n".join(lines))
        else:
            made = nbformat.v4.new_code_cell(body)
        made["id"] = hashlib.sha256(f"{number} {body}".encode()).hexdigest()[:8]
        cells.append(made)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


def execute(made: nbformat.NotebookNode, folder: Path) -> None:
    """Run all cells in a kernel of its own, in `folder`; the outputs are kept in the notebook."""
    NotebookClient(made, timeout=1800, resources={"metadata": {"path": str(folder)}}).execute()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--execute", action="store_true", help="run it, and keep what it prints and draws")
    arguments = parser.parse_args()
    made = notebook(SOURCE.read_text(encoding="utf-8"))
    if arguments.execute:
        with tempfile.TemporaryDirectory(dir=SOURCE.parent) as folder:
            execute(made, Path(folder))
    for cell in made.cells:  # when it ran, and the bars of progress, which are lines without end
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(made, SOURCE.with_suffix(".ipynb"))
    print(SOURCE.with_suffix(".ipynb"))


if __name__ == "__main__":
    main()
