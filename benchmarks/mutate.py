"""Mutation testing of the maths modules: change one thing at a time and see whether the tests notice.

    python benchmarks/mutate.py                     # all five modules, about half an hour on one core
    python benchmarks/mutate.py --module ppo        # one of them
    python benchmarks/mutate.py --list              # say what would be changed, run nothing

Every mutant is one edit of the syntax tree: a comparison, an operator, a sign, a constant, a dropped mask or detach,
two arguments in the wrong order, a check that is not made. It is written into a copy of the package in a temporary
folder, and the maths tests run on it in a forked process until the first failure. A mutant that no test notices
survives; the survivors are printed with their line and explained in `benchmarks/mutants.md`.

Left out on purpose: mutants of docstrings, annotations and error messages, and several edits at once.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import importlib.metadata
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).parent.parent
MODULES = {"ops": "ops", "ppo": "ppo", "dpo": "dpo", "bradley_terry": "bradley_terry", "grpo": "advantages"}  # tests
TIMEOUT = 120  # seconds for all tests of one mutant; they take about ten

COMPARISONS = {
    ast.Lt: [ast.LtE, ast.Gt],
    ast.LtE: [ast.Lt, ast.GtE],
    ast.Gt: [ast.GtE, ast.Lt],
    ast.GtE: [ast.Gt, ast.LtE],
    ast.Eq: [ast.NotEq],
    ast.NotEq: [ast.Eq],
    ast.Is: [ast.IsNot],
    ast.IsNot: [ast.Is],
    ast.In: [ast.NotIn],
    ast.NotIn: [ast.In],
}
OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
NAMES = {
    "maximum": "minimum",
    "max": "min",
    "min": "max",
    "sum": "mean",
    "exp": "expm1",
    "expm1": "exp",
    "log": "log1p",
    "log1p": "log",
    "square": "abs",
    "abs": "square",
    "rsqrt": "sqrt",
    "log_softmax": "softmax",
    "logsigmoid": "sigmoid",
    "sigmoid": "logsigmoid",
    "relu": "abs",
    "cumsum": "cumprod",
    "kl_k1": "kl_k2",
    "check_positive": "check_pairs",
}
# Calls whose argument (or object) may stand in their place: upcast(x) -> x, x.detach() -> x.
UNWRAPPED = {"upcast", "reversed", "relu", "sigmoid", "logsigmoid", "exp", "expm1", "log", "log1p", "rsqrt", "float"}
UNWRAPPED |= {"detach", "clamp", "square", "abs", "long", "to", "sum", "select"}
SYMMETRIC = {"maximum", "minimum", "isinstance"}


def called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def is_module_function(node: ast.Call) -> bool:
    """torch.f(x), F.f(x) and f(x), as against the method x.f()."""
    function = node.func
    return not isinstance(function, ast.Attribute) or (
        isinstance(function.value, ast.Name) and function.value.id in ("torch", "F", "ops", "math")
    )


def call_variants(node: ast.Call) -> Iterator[ast.AST]:
    name, arguments = called(node), node.args
    if name in NAMES:
        mutant = copy.deepcopy(node)
        if isinstance(mutant.func, ast.Attribute):
            mutant.func.attr = NAMES[name]
        else:
            mutant.func.id = NAMES[name]
        yield mutant
    if name == "where":
        yield arguments[1]
        yield arguments[2]
        yield ast.Call(node.func, [arguments[0], arguments[2], arguments[1]], node.keywords)
    elif len(arguments) > 1 and name not in SYMMETRIC:
        yield ast.Call(node.func, [arguments[1], arguments[0], *arguments[2:]], node.keywords)
    if name in UNWRAPPED:
        inside = arguments[0] if is_module_function(node) else node.func.value
        yield inside
    for i, keyword in enumerate(node.keywords):
        if keyword.arg == "denominator":
            yield ast.Call(node.func, arguments, node.keywords[:i] + node.keywords[i + 1 :])


def constant_variants(node: ast.Constant) -> Iterator[ast.AST]:
    if isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node.value, int | float):
        yield ast.Constant(node.value + 1)
        yield ast.Constant(node.value - 1)
        if isinstance(node.value, float) and node.value:
            yield ast.Constant(node.value * 2)


def function_variants(node: ast.FunctionDef) -> Iterator[ast.AST]:
    """Without a decorator; without one statement of the body that is a bare call or rebinds a parameter."""
    parameters = {a.arg for a in node.args.args + node.args.kwonlyargs}

    def rebuilt(**changes: object) -> ast.FunctionDef:
        mutant = copy.copy(node)
        for name, value in changes.items():
            setattr(mutant, name, value)
        return mutant

    for i in range(len(node.decorator_list)):
        yield rebuilt(decorator_list=node.decorator_list[:i] + node.decorator_list[i + 1 :])
    for i, statement in enumerate(node.body):
        is_call = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
        rebinds = (
            isinstance(statement, ast.Assign)
            and {name.id for name in ast.walk(statement.targets[0]) if isinstance(name, ast.Name)} & parameters
        )
        if is_call or rebinds:
            yield rebuilt(body=[*node.body[:i], ast.Pass(), *node.body[i + 1 :]])


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """All that may stand in the place of `node`."""
    match node:
        case ast.Compare(left=left, ops=operators, comparators=right):
            for i, operator in enumerate(operators):
                for other in COMPARISONS[type(operator)]:
                    yield ast.Compare(left, [*operators[:i], other(), *operators[i + 1 :]], right)
        case ast.BinOp(left=left, op=operator, right=right) if type(operator) in OPERATORS:
            yield ast.BinOp(left, OPERATORS[type(operator)](), right)
        case ast.AugAssign(target=target, op=operator, value=value):
            yield ast.AugAssign(target, OPERATORS[type(operator)](), value)
        case ast.BoolOp(op=operator, values=values):
            yield ast.BoolOp(ast.Or() if isinstance(operator, ast.And) else ast.And(), values)
        case ast.UnaryOp(operand=operand):
            yield operand
        case ast.IfExp(test=test, body=body, orelse=orelse):
            yield ast.IfExp(test, orelse, body)
        case ast.If(test=test, body=body, orelse=orelse):
            yield ast.If(ast.UnaryOp(ast.Not(), test), body, orelse)
        case ast.Return(value=ast.Tuple(elts=elements)):
            yield ast.Return(ast.Tuple(elements[::-1], ast.Load()))
        case ast.Call():
            yield from call_variants(node)
        case ast.Constant():
            yield from constant_variants(node)
        case ast.FunctionDef():
            yield from function_variants(node)


def mutable_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that compute something: no annotations, docstrings or error messages."""
    yield node
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, ast.Raise):
                yield from mutable_nodes(child)


class Replace(ast.NodeTransformer):
    """One node for another, wherever it stands."""

    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


def difference(before: str, after: str) -> str:
    """The lines of two programs that differ; both come out of `ast.unparse`, so nothing else does."""
    old, new = before.splitlines(), after.splitlines()
    start = next(i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b)
    return f"{old[start].strip()}  ->  {new[start].strip() or '(nothing)'}"


def mutants(source: str) -> Iterator[tuple[int, str, str]]:
    """Line, description and program of every mutant of a module."""
    tree = ast.parse(source)
    before, seen = ast.unparse(tree), set()
    for node in list(mutable_nodes(tree)):
        for variant in variants(node):
            memo: dict[int, ast.AST] = {}
            mutant = copy.deepcopy(tree, memo)
            mutant = Replace(memo[id(node)], copy.deepcopy(variant)).visit(mutant)
            after = ast.unparse(ast.fix_missing_locations(mutant))
            if after != before and after not in seen:
                seen.add(after)
                yield node.lineno, difference(before, after), after


def tests_for(module: str) -> list[str]:
    """The maths tests, the module's own first."""
    names = [MODULES[module], *(tests for m, tests in MODULES.items() if m not in (module, "grpo")), "gradients"]
    return [f"tests/test_{name}.py" for name in names]


def passes(folder: Path, tests: list[str]) -> bool:
    """Whether the tests pass on the copy in `folder`, in a fork: torch and hypothesis are loaded only once."""
    child = os.fork()
    if child == 0:
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            signal.alarm(TIMEOUT)
            os.chdir(folder)
            sys.path.insert(0, str(folder))
            os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])))
    return os.waitpid(child, 0)[1] == 0


def run(module: str, folder: Path) -> tuple[int, list[str]]:
    """The number of a module's mutants, and a line for each survivor."""
    target, tests = folder / "minirlhf" / f"{module}.py", tests_for(module)
    source = target.read_text()
    target.write_text(ast.unparse(ast.parse(source)))
    if not passes(folder, tests):
        raise SystemExit(f"the tests fail on {module} as it is; mutants would say nothing")
    count, survivors = 0, []
    for line, description, program in mutants(source):
        target.write_text(program)
        count += 1
        if passes(folder, tests):
            survivors.append(f"{module}.py:{line}  {description}")
            print(f"    survived  {survivors[-1]}", flush=True)
    target.write_text(source)
    return count, survivors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--module", choices=MODULES, action="append", help="repeatable; default: all")
    parser.add_argument("--list", action="store_true", help="print the mutants, run nothing")
    arguments = parser.parse_args()
    modules = arguments.module or list(MODULES)
    if arguments.list:
        for module in modules:
            for line, description, _ in mutants((ROOT / "minirlhf" / f"{module}.py").read_text()):
                print(f"{module}.py:{line}  {description}")
        return
    sys.dont_write_bytecode = True  # a mutant of equal size and time would run as its predecessor
    hypothesis.settings.register_profile("mutate", phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate])
    hypothesis.settings.load_profile("mutate")  # the first failure is enough: no search for the smallest one
    torch.set_num_threads(1)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "hypothesis", "pytest")}
    print(f"Python {platform.python_version()}, {', '.join(' '.join(item) for item in versions.items())}")
    total, alive = 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("minirlhf", "tests", "data"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        for script in ROOT.glob("train_*.py"):
            shutil.copy(script, folder)
        for module in modules:
            started = time.monotonic()
            count, survivors = run(module, folder)
            total, alive = total + count, alive + len(survivors)
            print(
                f"{module}: {count - len(survivors)} of {count} killed in {time.monotonic() - started:.0f} s",
                flush=True,
            )
    print(f"together: {total - alive} of {total} killed, {(total - alive) / total:.1%}")


if __name__ == "__main__":
    main()
