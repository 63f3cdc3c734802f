"""No code in the tree runs what it reads: parsed from the source, so that nothing has to run."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("minirlhf", "studies", "benchmarks", "data")
CALLS = {"eval", "exec", "compile", "__import__"}
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# Functions that unpickle unless they are told not to: only named with the argument that forbids it.
LOADERS = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}


def sources() -> list[Path]:
    files = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
    return sorted(path for path in files if ".venv" not in path.parts)


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a name or an attribute, else an empty string."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def findings(source: str) -> list[str]:
    """What is forbidden in a piece of source, with the line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "").split(".")[0]]
        found += [f"{node.lineno}: imports {name}" for name in names if name in MODULES]
        if isinstance(node, ast.Call):
            found += _findings_of_call(node)
    return found


def _findings_of_call(node: ast.Call) -> list[str]:
    name = dotted(node.func)
    keywords = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
    wrong = name in CALLS | SHELLS or keywords.get("shell") is True
    wrong |= keywords.get("weights_only", True) is not True or keywords.get("allow_pickle", False) is not False
    wrong |= keywords.get("trust_remote_code", False) is not False
    if name in LOADERS:
        argument, value = LOADERS[name]
        wrong |= keywords.get(argument) is not value
    return [f"{node.lineno}: calls {name}"] if wrong else []


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_is_read_is_run(path: Path) -> None:
    assert findings(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "exec(text)",
        "import pickle",
        "from pickle import loads",
        "import os; os.system('ls')",
        "subprocess.run('ls', shell=True)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "load(path, weights_only=flag)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_what_is_forbidden_would_be_found(source: str) -> None:
    assert len(findings(source)) == 1


@pytest.mark.parametrize("source", ["model.eval()", "torch.load(path, weights_only=True)", "re.compile('a')"])
def test_what_looks_alike_is_left_alone(source: str) -> None:
    assert findings(source) == []
