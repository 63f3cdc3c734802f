"""minirlhf: RLHF from scratch in plain PyTorch. `ls` this folder for the syllabus; docs/design.md draws the house.

The files here are the algorithm, the folders what surrounds it: a stage's run (runs/), anyone's data (data/), Hugging
Face (hf/), the embedded world (world/), labels (feedback/), judging (evaluate/) and the page about a run (report/).
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys

__version__ = "0.1.0"

# Modules that have moved, by their old names: `from minirlhf.rewards import AnswerKey` goes on working.
OLD_NAMES = {
    "rewards": "reward_functions",
    "advantages": "grpo",
    "processes": "distributed",
    "settings": "config",
    "metrics": "runs.log",
    "calibration": "evaluate.calibration",
    "data.fields": "data.formats",
}


class _OldNames(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module by its old name: it is the module of the new name, not a copy."""

    def find_spec(self, name, path=None, target=None):
        if name.removeprefix(f"{__name__}.") not in OLD_NAMES:
            return None
        found = importlib.machinery.ModuleSpec(name, self, origin=importlib.util.find_spec(self.new_name(name)).origin)
        found.has_location = True  # for `python -m`, which then knows the file
        return found

    def new_name(self, name):
        return f"{__name__}.{OLD_NAMES[name.removeprefix(f'{__name__}.')]}"

    def create_module(self, spec):
        module = importlib.import_module(self.new_name(spec.name))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module):
        module.__spec__ = module.__spec__.loader_state  # the import has put the old name's there

    def get_code(self, name):  # for `python -m`
        new = importlib.util.find_spec(self.new_name(name))
        return new.loader.get_code(new.name)


sys.meta_path.append(_OldNames())
