"""One-line mutations of all code but the maths, drawn by lot: what `recorded_mutants.py` records and tries again.

Each module, and each of the four scripts, gets its share by the number of its code lines, and each line at most one
edit. The edits are those of `mutate.py` and a few for text and lists, made in the text of one line. Left out: messages,
annotations, and keywords that change no result (`strict=`, `flush=`).
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import copy
import random
import re
from collections.abc import Iterator
from pathlib import Path

import mutate

ROOT = Path(__file__).resolve().parent.parent
COUNT, SEED = 200, 0
NO_RESULT = {"strict", "flush", "frozen", "indent", "figsize", "dpi", "linewidth", "stacklevel", "fontsize", "sharex"}
RENAMED = {"any": "all", "all": "any", "startswith": "endswith", "endswith": "startswith", "sorted": "list"}
RENAMED |= {"lstrip": "rstrip", "rstrip": "lstrip", "removeprefix": "removesuffix", "extend": "append"}
SILENT = {"print", "say", "warn", "set_title", "set_xlabel", "set_ylabel", "legend", "tight_layout"}
JOINING = (ast.List, ast.Dict, ast.ListComp, ast.DictComp, ast.JoinedStr, str)
NOT_DRAWN = r"TYPE_CHECKING|__name__|\bplt\.|(folder|root|run|path) \* \w"


# -------------------------------------------------------------------------------------------------------------- drawing
def is_swap(old: ast.AST, new: ast.AST) -> bool:
    """The same call with its arguments in another order."""
    return isinstance(old, ast.Call) and isinstance(new, ast.Call) and mutate.called(old) == mutate.called(new)


def edits(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """A part of `node` and what may stand in its place."""
    parts = [getattr(node, name, None) for name in ("left", "right", "value")] if hasattr(node, "op") else []
    joined = any(isinstance(getattr(part, "value", part), JOINING) for part in parts)  # not added, or a path
    with contextlib.suppress(IndexError, KeyError):  # calls and operators that the maths modules do not have
        for new in mutate.variants(node):
            if isinstance(node, ast.Call) and isinstance(new, ast.Call):
                alike = all(isinstance(part, ast.Name | ast.Attribute | ast.Subscript) for part in new.args[:2])
                known = not isinstance(new.func, ast.Name) or hasattr(builtins, new.func.id)
                yield from [(node, new)] if (alike if is_swap(node, new) else known) else []
            elif not isinstance(node, ast.FunctionDef) and not joined:
                yield (node.test, new.test) if isinstance(node, ast.If) else (node, new)
    if isinstance(node, ast.Call) and mutate.called(node) in RENAMED:
        new = copy.deepcopy(node)
        setattr(new.func, "id" if isinstance(new.func, ast.Name) else "attr", RENAMED[mutate.called(node)])
        yield node, new
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and mutate.called(node.value) not in SILENT:
        yield node, ast.Pass()
    elif isinstance(node, ast.Continue):
        yield node, ast.Break()


def new_line(source: str, old: ast.AST, new: ast.AST) -> str | None:
    """The line of `old` with `new` in its place; None where that is no Python, no change or takes several lines."""
    lines, text, programs = source.splitlines(), ast.unparse(ast.fix_missing_locations(new)), []
    line = lines[old.lineno - 1].encode()  # columns are counted in bytes
    for middle in (text, f"({text})") if isinstance(old, ast.expr) else (text,):
        lines[old.lineno - 1] = (line[: old.col_offset] + middle.encode() + line[old.end_col_offset :]).decode()
        with contextlib.suppress(SyntaxError):
            programs.append((ast.dump(ast.parse("\n".join(lines))), lines[old.lineno - 1]))
    if old.lineno != old.end_lineno or not programs or "\n" in text or programs[-1][0] == ast.dump(ast.parse(source)):
        return None
    return next(line for program, line in programs if program == programs[-1][0])  # brackets only where needed


def pool(path: Path) -> dict[int, list[tuple[ast.AST, ast.AST]]]:
    """The edits of a module by their line; a swap of arguments only where a line has nothing else."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), {}
    said = [n for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) or getattr(n, "arg", None) in NO_RESULT]
    silent = {id(part) for node in said for part in ast.walk(node)}
    for node in mutate.mutable_nodes(tree):
        for old, new in edits(node) if id(node) not in silent else ():
            found.setdefault(old.lineno, []).append((old, new))
    return {line: [pair for pair in pairs if not is_swap(*pair)] or pairs for line, pairs in found.items()}


def draw(count: int = COUNT) -> list[dict]:
    """`count` mutants of the tree, by code size."""
    sources = code(ROOT)
    maths = {ROOT / "minirlhf" / f"{name}.py" for name in mutate.MODULES}
    pools = {path: lines for path in sources if path not in maths and (lines := pool(path))}
    nodes = {path: ast.walk(ast.parse(path.read_text(encoding="utf-8"))) for path in pools}
    sizes = {path: len({n.lineno for n in found if hasattr(n, "lineno")}) for path, found in nodes.items()}
    exact = {path: count * size / sum(sizes.values()) for path, size in sizes.items()}
    share = {path: int(number) for path, number in exact.items()}
    for path in sorted(exact, key=lambda path: share[path] - exact[path])[: count - sum(share.values())]:
        share[path] += 1
    generator, drawn = random.Random(SEED), []
    for path, lines in pools.items():
        source, name, left = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix(), share[path]
        for number in generator.sample(sorted(lines), len(lines)):
            line = new_line(source, *generator.choice(lines[number])) if left else None
            if line is None or re.search(NOT_DRAWN, line):
                continue
            old, new = snippet(sources, path, number - 1, line.strip())
            drawn.append({"number": len(drawn) + 1, "module": name, "line": number, "old": old, "new": new})
            left -= 1
    return drawn


# ----------------------------------------------------------------------------------------------------------------- text
def code(root: Path) -> dict[Path, list[str]]:
    """The lines of all code files, without the spaces around them."""
    paths = [path for part in ("*.py", "minirlhf/**/*.py", "studies/**/*.py") for path in sorted(root.glob(part))]
    return {path: [line.strip() for line in path.read_text(encoding="utf-8").splitlines()] for path in paths}


def places(sources: dict[Path, list[str]], text: list[str]) -> list[tuple[Path, int]]:
    """Where these lines stand, one below the other."""
    return [
        (path, i)
        for path, lines in sources.items()
        for i, line in enumerate(lines)
        if line == text[0] and lines[i : i + len(text)] == text
    ]


def snippet(sources: dict[Path, list[str]], path: Path, at: int, new: str) -> tuple[str, str]:
    """The line at `at` as it is and as `new`, each with as many lines around it as make it unique."""
    lines, first, last = sources[path], at, at + 1
    while len(places(sources, lines[first:last])) > 1:
        first, last = (max(0, first - 1), last) if (last - first) % 2 else (first, last + 1)
    return "\n".join(lines[first:last]), "\n".join([*lines[first:at], new, *lines[at + 1 : last]])
