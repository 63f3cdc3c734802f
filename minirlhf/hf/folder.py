"""The Hugging Face folder of a GPT-2, in and out: config.json and model.safetensors.

Weights are read and written as safetensors alone, one tensor at a time: loading never holds a second copy of them.
Weights in several files, with model.safetensors.index.json, are read too; they are written as one file.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from minirlhf.files import atomic, write_text
from minirlhf.hf.hub import INDEX, WEIGHTS, weight_files
from minirlhf.runtime import UserError, held_signals

SHAPE = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
# config.json settings that change the arithmetic, with the values this model computes (absent ones have these too).
FIXED_SETTINGS = {
    "activation_function": "gelu_new",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}
# Causal masks that older checkpoints store as buffers.
STORED_MASK = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
# GPT-2's Conv1D keeps its weights as (in, out), nn.Linear as (out, in). A square one would load the wrong way round
# without any complaint, so this goes by name and never by shape.
CONV1D_WEIGHT = re.compile(r".*\.(c_attn|c_proj|c_fc)\.weight")
FLOAT_TYPES = ("F64", "F32", "F16", "BF16")  # safetensors' names of the number formats that weights may have


class CheckpointError(UserError, ValueError):
    """A model folder that cannot be read as what was asked for: what, where and how to fix it, in one line."""


def read_settings(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in config.json; raises CheckpointError naming every one that is missing or not GPT-2's."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give a folder that holds config.json and model.safetensors")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}); save the model again") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path}: not a JSON object; save the model again")
    wrong = [f"{name} is missing" for name in SHAPE if name not in settings]
    wrong += [
        f"{name} is {settings[name]!r} (supported: {value!r})"
        for name, value in {"model_type": "gpt2", **FIXED_SETTINGS}.items()
        if settings.get(name, value) != value
    ]
    if not wrong and settings.get("n_inner") not in (None, 4 * settings["n_embd"]):
        wrong.append(f"n_inner is {settings['n_inner']} (supported: null or 4 * n_embd = {4 * settings['n_embd']})")
    if not isinstance(settings.get("eos_token_id"), int | None):
        wrong.append(f"eos_token_id is {settings['eos_token_id']!r} (supported: one id, or null)")
    if wrong:
        raise CheckpointError(f"{path}: {'; '.join(wrong)}; only plain GPT-2 models can be loaded")
    return settings


def write_config(
    folder: str | os.PathLike[str],
    config: Any,
    *,
    architecture: str,
    dtype: torch.dtype,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write config.json for the transformers class named `architecture`, with `extra` settings of that class.

    config  a GPTConfig, whose fields have the names of Hugging Face's settings
    """
    settings = {
        "architectures": [architecture],
        "model_type": "gpt2",
        "dtype": str(dtype).removeprefix("torch."),
        **{field.name: getattr(config, field.name) for field in fields(config)},
        "bos_token_id": config.eos_token_id,  # GPT-2 has one special token for both ends
        "n_inner": None,
        **FIXED_SETTINGS,
        # This model has no dropout; without these lines transformers would train it with 0.1.
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout"), 0.0),
        **(extra or {}),
    }
    write_text(Path(folder) / "config.json", json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _file_name(name: str) -> str:
    """Hugging Face's name of a parameter of GPT (h.0.…), RewardModel or ValueModel (gpt.h.0.…)."""
    if name.startswith(("lm_head.", "score.")):
        return name
    return "transformer." + name.removeprefix("gpt.")


@torch.no_grad()
def write_tensors(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write model.safetensors under Hugging Face's names, Conv1D weights as (in, out), in one step."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach().cpu()
        tensors[_file_name(name)] = (tensor.T if CONV1D_WEIGHT.fullmatch(name) else tensor).contiguous()
    with atomic(Path(folder) / "model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


@torch.no_grad()
def read_tensors(model: nn.Module, folder: str | os.PathLike[str], *, tied_head: bool = False) -> None:
    """Give every parameter of a model on the meta device its tensor from the weights' files, one at a time.

    tied_head  whether the head is the token embedding, which older files store a second time: read only if equal
    Names with and without the prefix "transformer." are read. Raises one CheckpointError that names every missing,
    unexpected and misshapen tensor; nothing is skipped and nothing is left as it was initialised.
    """
    paths = weight_files(Path(folder))
    path = paths[0] if len(paths) == 1 else Path(folder) / (INDEX if paths else WEIGHTS)
    missing = [part.name for part in paths if not part.is_file()]
    if not paths:
        raise CheckpointError(f"{path}: no such file; pickled weights are not read, save the model as safetensors")
    if missing:
        raise CheckpointError(f"{Path(folder) / INDEX}: no {', '.join(missing)} beside it; fetch the whole model")
    with contextlib.ExitStack() as stack:
        file_of: dict[str, Any] = {}  # the open file of each tensor, which is read when it is asked for
        for part in paths:
            try:
                file = stack.enter_context(safe_open(part, framework="pt"))
            except SafetensorError as error:
                raise CheckpointError(f"{part}: not a safetensors file ({error}); save the model again") from error
            twice = sorted(file_of.keys() & set(file.keys()))
            if twice:
                raise CheckpointError(f"{part}: {', '.join(twice)} is in another part too; save the model again")
            file_of |= dict.fromkeys(file.keys(), file)
        _assign(model, file_of, path, tied_head=tied_head)


def _assign(model: nn.Module, file_of: dict[str, Any], path: Path, *, tied_head: bool) -> None:
    parameters = {_file_name(name): (name, parameter) for name, parameter in model.named_parameters()}
    stored, wrong = {}, []
    for key in sorted(file_of):
        bare = key.removeprefix("transformer.")
        name = bare if bare.startswith(("lm_head.", "score.")) else f"transformer.{bare}"
        if STORED_MASK.fullmatch(bare) or (tied_head and name == "lm_head.weight" and _repeats_embedding(file_of, key)):
            continue
        if name not in parameters or name in stored:
            wrong.append(f"unexpected {key}")
        stored[name] = key
    wrong += [f"missing {name}" for name in parameters if name not in stored]
    for name in parameters.keys() & stored.keys():
        parameter = parameters[name][1]
        expected = tuple(parameter.T.shape if CONV1D_WEIGHT.fullmatch(name) else parameter.shape)
        piece = file_of[stored[name]].get_slice(stored[name])
        shape = tuple(piece.get_shape())
        if shape != expected or piece.get_dtype() not in FLOAT_TYPES:
            wrong.append(f"{stored[name]} is {piece.get_dtype()} {shape} and not floating-point {expected}")
    if wrong:
        kind = type(model).__name__
        raise CheckpointError(f"{path}: {'; '.join(sorted(wrong))}; give a folder that holds a {kind} as configured")
    for name, (ours, _) in parameters.items():
        with held_signals():  # what is raised within becomes a ValueError
            tensor = file_of[stored[name]].get_tensor(stored[name])
        tensor = tensor.T if CONV1D_WEIGHT.fullmatch(name) else tensor
        # A fresh copy: the file may be mapped into memory, and is then neither aligned nor ours to keep.
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        owner, _, leaf = ours.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))


def _repeats_embedding(file_of: dict[str, Any], head: str) -> bool:
    """True where the head that a file stores is its token embedding."""
    embedding = head.replace("lm_head.", "wte.")
    embedding = embedding if embedding in file_of else f"transformer.{embedding}"
    both = [file_of[name].get_tensor(name) for name in (head, embedding) if name in file_of]
    return len(both) == 2 and torch.equal(*both)
