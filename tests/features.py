"""What users rely on, as it is and as features.json lists it: test_features.py compares the two.

Flags are read from the parser that a command itself builds, and commands are found by starting what can be started: so
it does not matter which file a setting lives in.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
import io
import json
import pkgutil
import re
import runpy
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import test_commands as pages
import tiny
import tyro

from minirlhf.runs.log import read_rows

ROOT = Path(__file__).resolve().parent.parent
LIST = Path(__file__).with_name("features.json")
# Beside the modules; the rest of studies/, benchmarks/ and docs/ is the project's own.
SCRIPTS = ("train_*.py", "data/*.py", "studies/ablate.py")
THERE = "there"


# --------------------------------------------------------------------------------------------------- commands and flags
class Reached(Exception):
    """A command has come to where it reads its arguments: its parser, and what holds its defaults."""

    def __init__(self, parser: argparse.ArgumentParser, default: object) -> None:
        super().__init__()
        self.parser, self.default = parser, default
        self.actions = [action for action in parser._actions if action.dest != "help"]


@functools.cache
def reach(command: str, *words: str) -> Reached | str:
    """Start a command and stop it where it reads its arguments; or what it says, where it does not come so far."""

    def cli(config: type, *, default: Any, args: list[str], **_: Any) -> None:
        parser = argparse.ArgumentParser()
        if "MODEL" not in words:  # which asks for the kind of command alone
            with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
                parser = tyro.extras.get_parser(config, default=default)
        if "--debug" not in args:  # it was taken out before
            parser.add_argument("--debug", action="store_true", help="known to every script")
        raise Reached(parser, default)

    def parse_args(parser: argparse.ArgumentParser) -> None:
        raise Reached(parser, argparse.Namespace())

    _, *start = [*command.split(), *words, "--debug", "--help"]  # what is not stopped shows its help and ends
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        patch.setattr(tyro, "cli", cli)
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(sys, "argv", start[start[0] == "-m" :])
        patch.syspath_prepend(str((ROOT / start[0]).parent))
        try:
            if start[0] == "-m":
                with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # it was imported before
                    runpy.run_module(start[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / start[0]), run_name="__main__")
        except Reached as reached:
            return reached
        except (Exception, SystemExit) as error:
            return f"{said.getvalue()}{error}"
    return f"{command} reads no arguments"


def all_commands() -> list[str]:
    """Whatever can be started or was, with the words that make another command of it."""
    starts = {re.match(r"python (-m )?\S+", command).group() for command in read_list()["presets"]}
    starts |= {f"python {path.relative_to(ROOT)}" for pattern in SCRIPTS for path in ROOT.glob(pattern)}
    for path in (ROOT / "minirlhf").rglob("*.py"):
        if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8"):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            starts.add(f"python -m {module.removesuffix('.__main__')}")
    found = set()
    for start in starts:
        alone, word, by = (reach(start, *words) for words in ((), ("MODEL",), ("MODEL", "--by", "MODEL")))
        said = "\n".join(reached for reached in (alone, word, by) if isinstance(reached, str))
        names = [name for listed in re.findall("not one of (.+)", said) for name in listed.split(", ")]
        names += re.findall(rf"write: {start} (\w+)", said)
        found |= {f"{start} {name}" for name in names}
        if isinstance(alone, Reached) or not names:
            found.add(start)
        if isinstance(word, Reached) and vars(word.default).keys() != vars(alone.default).keys():
            found.add(f"{start} MODEL")
    return sorted(found)


@functools.cache
def parsers() -> dict[str, dict[str, Reached]]:
    """The parsers of every command by preset; "default" where there are none to choose from."""
    found: dict[str, dict[str, Reached]] = {}
    for command in all_commands():
        first = reach(command)
        found[command] = {}
        if isinstance(first, Reached):
            presets = [action for action in first.actions if "--preset" in action.option_strings]
            choices = presets[0].choices if presets else ()
            under = {name: reach(command, "--preset", name) for name in choices} or {"default": first}
            found[command] = {name: reached for name, reached in under.items() if isinstance(reached, Reached)}
    return found


def presets(_: Iterable[str]) -> dict[str, Any]:
    """The presets of every command; what a command says that does not come so far as to read its arguments."""
    return {command: list(under) or reach(command) for command, under in parsers().items()}


def name_of(action: argparse.Action) -> str:
    """A flag as it is typed, a positional argument by its name."""
    return "/".join(action.option_strings) or action.dest


def flags(_: Iterable[str]) -> dict[str, Any]:
    """Every flag of every command: its type, and its default under each preset."""
    found: dict[str, Any] = {}
    for command, under in parsers().items():
        for preset, reached in under.items():
            for action in reached.actions:
                default = getattr(reached.default, action.dest.replace("-", "_"), action.default)
                plain = json.dumps(default, default=str).replace(str(ROOT), "<project>")
                flag = found.setdefault(f"{command} {name_of(action)}", {"type": type_of(action)})
                flag[preset] = json.loads(plain)
    return found


def type_of(action: argparse.Action) -> str:
    kind = action.metavar or ("switch" if action.nargs == 0 else getattr(action.type, "__name__", "str"))
    return f"{'' if action.option_strings else 'positional '}{kind}{', required' if action.required else ''}"


# ----------------------------------------------------------------------------------------------- pages, names and files
def commands(_: Iterable[str]) -> dict[str, Any]:
    """The command lines that the pages show."""
    return {command.text: THERE for page in pages.PAGES for command in pages.commands(page)}


def imports_of_the_pages() -> set[str]:
    """The imports of this project that the pages show, each on one line."""
    texts = [page.read_text(encoding="utf-8") for page in (*pages.PAGES, ROOT / "docs" / "walkthrough.py")]
    notebook = json.loads((ROOT / "docs" / "walkthrough.ipynb").read_text(encoding="utf-8"))
    texts += ["".join(cell["source"]) for cell in notebook["cells"]]
    ours = r"(?:minirlhf|train_\w+)[\w.]*"
    found = re.findall(rf"^ *(from {ours} import (?:\([^)]*\)|.*)|import {ours}.*)", "\n".join(texts), re.M)
    return {" ".join(re.sub(r"[()]|#.*", "", line).split()).rstrip(",") for line in found}


def imports(wanted: Iterable[str]) -> dict[str, Any]:
    """Those of the wanted imports that work."""
    found = {}
    for line in wanted:
        with contextlib.suppress(ImportError):
            exec(line, {})
            found[line] = THERE
    return found


def signatures(wanted: Iterable[str]) -> dict[str, Any]:
    """Parameters and defaults of the wanted functions and classes, as far as they exist."""
    found = {}
    for name in wanted:
        with contextlib.suppress(ImportError, AttributeError):
            signature = inspect.signature(pkgutil.resolve_name(name))
            bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
            found[name] = str(signature.replace(parameters=bare, return_annotation=signature.empty))
    return found


def files(_: Iterable[str]) -> dict[str, Any]:
    """What every stage of a finished run leaves in its folder; N stands for the number of a checkpoint."""
    run = tiny.finished_run()
    found = [path for stage in tiny.STAGES for path in (run / stage).rglob("*") if path.is_file()]
    names = [str(path.relative_to(run)) for path in found if path.name != "hints.jsonl"]  # which the numbers decide
    return {re.sub(r"(?<=checkpoints/)\d+", "N", name): THERE for name in names}


def metrics(_: Iterable[str]) -> dict[str, Any]:
    """The keys of the rows of every stage's metrics.jsonl."""
    rows = {stage: read_rows(tiny.finished_run() / stage) for stage in tiny.STAGES}
    return {f"{stage} {key}": THERE for stage in rows for row in rows[stage] for key in row}


# ------------------------------------------------------------------------------------------------------------- the list
SECTIONS: dict[str, Callable[[Iterable[str]], dict[str, Any]]] = {
    **{"commands": commands, "presets": presets, "flags": flags, "imports": imports},
    **{"signatures": signatures, "files": files, "metrics": metrics},
}
LISTS = ("commands", "files", "imports", "metrics")  # those whose entries have no value


def read_list() -> dict[str, dict[str, Any]]:
    """The frozen list by section, as its changes leave it."""
    kept = json.loads(LIST.read_text(encoding="utf-8"))
    changes = kept.pop("changes")
    for name, section in kept.items():
        kept[name] = section if isinstance(section, dict) else dict.fromkeys(section, THERE)
    for change in changes:
        section, _, key = change["what"].partition(": ")
        assert change["reason"].strip(), f"{change['what']}: no reason is given"
        assert kept[section].pop(key, None) == change["was"], f"{change['what']}: that is not what it was"
        if change["now"] is not None:
            kept[section][key] = change["now"]
    return kept


def write_list() -> None:
    """A new list of what there is now, one entry a line; it keeps the names whose signatures it lists."""
    old = read_list()
    parts = ['"changes": []']
    for name, now in SECTIONS.items():
        found = now(imports_of_the_pages() if name == "imports" else old[name])
        keys, values = [json.dumps(key) for key in sorted(found)], [json.dumps(found[key]) for key in sorted(found)]
        if name in LISTS:
            parts.append(f'"{name}": [\n' + ",\n".join(keys) + "\n]")
        else:
            lines = [f"{key}: {value}" for key, value in zip(keys, values, strict=True)]
            parts.append(f'"{name}": {{\n' + ",\n".join(lines) + "\n}")
    LIST.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
