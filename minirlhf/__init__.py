"""minirlhf: RLHF from scratch in plain PyTorch. `ls` this folder for the syllabus; docs/design.md draws the house.

The files here are the algorithm, the folders what surrounds it: a stage's run (runs/), anyone's data (data/), Hugging
Face (hf/), the embedded world (world/), labels (feedback/), judging (evaluate/) and the page about a run (report/).
"""

import importlib
import importlib.abc
import importlib.machinery
import sys

__version__ = "0.1.0"

# Modules that have moved, by their old names: `from minirlhf.rewards import AnswerKey` goes on working.
OLD_NAMES = {"rewards": "reward_functions", "advantages": "grpo", "processes": "distributed"}


class _OldNames(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module under its old name: it is the module of the new name, not a copy."""

    def find_spec(self, name, path=None, target=None):
        package, _, old = name.rpartition(".")
        known = package == __name__ and old in OLD_NAMES
        return importlib.machinery.ModuleSpec(name, self) if known else None

    def create_module(self, spec):
        module = importlib.import_module(f"{__name__}.{OLD_NAMES[spec.name.rpartition('.')[2]]}")
        self.spec = module.__spec__
        return module

    def exec_module(self, module):
        module.__spec__ = self.spec  # the import has put the old name's there


sys.meta_path.append(_OldNames())
