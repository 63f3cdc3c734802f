"""minirlhf: RLHF from scratch in plain PyTorch. `ls` this folder for the syllabus; docs/design.md draws the house.

The files here are the algorithm, the folders what surrounds it: a stage's run (runs/), anyone's data (data/), Hugging
Face (hf/), the embedded world (world/), labels (feedback/), judging (evaluate/) and the page about a run (report/).
"""

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
    "dialogue": "chat",
    "ptx": "rollout",
}


class _Renamed(importlib.machinery.SourceFileLoader):
    """A loader of modules by their old names: each is the module of the new name, not a copy."""

    def exec_module(self, module):
        sys.modules[module.__name__] = importlib.import_module(_new_name(module.__name__))

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.removeprefix(f"{__name__}.") not in OLD_NAMES:
            return None
        file = importlib.util.find_spec(_new_name(name)).origin
        return importlib.util.spec_from_file_location(name, file, loader=cls(name, file))


def _new_name(name):
    return f"{__name__}.{OLD_NAMES[name.removeprefix(f'{__name__}.')]}"


sys.meta_path.append(_Renamed)
