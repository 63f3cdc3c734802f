"""Checkpoints for exact resume: the whole state of a stage in a folder that is either whole or not there.

    <stage>/checkpoints/00000100/state.safetensors   parameters, and the optimizers' moments by their parameter's name
                                 state.json          counters, the KL coefficient, the optimizers' settings
                                 manifest.json       stage, step, configuration, hashes of inputs, logs and these files
    <stage>/checkpoints/latest                       the name of the newest

What is not in it: random generators, data positions and learning rates, which are functions of (seed, stream, step)
everywhere in this project, and the reward model's normaliser, which is folded into its weights.
"""

from minirlhf.checkpoint.lock import only_writer, require_unlocked, require_writable
from minirlhf.checkpoint.manifest import (
    CHANGEABLE,
    Damaged,
    Manifest,
    check_same,
    plain,
    read_json,
    read_manifest,
    verify,
)
from minirlhf.checkpoint.marker import MARKER, clear_begun, mark_begun, mark_finished, outputs, read_marker
from minirlhf.checkpoint.state import Parts, expected, parts, restore
from minirlhf.checkpoint.store import (
    DiskFull,
    check,
    clean,
    disk_full,
    latest,
    load,
    require_space,
    save,
    write_atomically,
)

__all__ = [
    "CHANGEABLE",
    "Damaged",
    "DiskFull",
    "MARKER",
    "Manifest",
    "Parts",
    "check",
    "check_same",
    "clean",
    "clear_begun",
    "disk_full",
    "expected",
    "latest",
    "load",
    "mark_begun",
    "mark_finished",
    "only_writer",
    "outputs",
    "parts",
    "plain",
    "read_json",
    "read_manifest",
    "read_marker",
    "require_space",
    "require_unlocked",
    "require_writable",
    "restore",
    "save",
    "verify",
    "write_atomically",
]
