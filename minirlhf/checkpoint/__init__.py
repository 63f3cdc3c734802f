"""Checkpoints for exact resume: the whole state of a stage in a folder that is either whole or not there.

    <stage>/checkpoints/00000100/state.safetensors   parameters, and the optimizers' moments by their parameter's name
                                 state.json          counters, the KL coefficient, the optimizers' settings
                                 manifest.json       stage, step, configuration, hashes of inputs, logs and these files
    <stage>/checkpoints/latest                       the name of the newest

What is not in it: random generators, data positions and learning rates, which are functions of (seed, stream, step)
everywhere in this project, and the reward model's normaliser, which is folded into its weights.
"""

from minirlhf.checkpoint.manifest import Damaged, Manifest, check_same, plain, read_json, read_manifest, verify
from minirlhf.checkpoint.state import Parts, expected, parts
from minirlhf.checkpoint.store import DiskFull, clean, disk_full, latest, load, require_space, save, write_atomically

__all__ = [
    "Damaged",
    "DiskFull",
    "Manifest",
    "Parts",
    "check_same",
    "clean",
    "disk_full",
    "expected",
    "latest",
    "load",
    "parts",
    "plain",
    "read_json",
    "read_manifest",
    "require_space",
    "save",
    "verify",
    "write_atomically",
]
