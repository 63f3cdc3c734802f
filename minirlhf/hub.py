"""Names on the Hugging Face hub, at fixed revisions: model folders and where a data set stands.

A folder on this machine always comes first. Downloads go to the hub's own cache and are not repeated; a name without
a revision is resolved once to the commit that it stands for now, and that commit is said.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from minirlhf.runtime import UserError

# The commits that hold OpenAI's weights as safetensors.
REVISIONS = {
    "gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "gpt2-medium": "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
    "gpt2-large": "32b71b12589c2f8d625668d2335a01cac3249519",
    "gpt2-xl": "15ea56dee5df4983c59b2538573817e1667135e2",
}
# No pickled weights: they are never downloaded.
MODEL_FILES = ["config.json", "model.safetensors", "vocab.json", "merges.txt"]
NAME = re.compile(r"(?P<name>\w[\w.-]*(/\w[\w.-]*)?)(@(?P<revision>[\w./-]+))?")
SECONDS = 5  # to wait for the hub's first answer


def model_folder(source: str | os.PathLike[str]) -> Path:
    """The folder of a model: a folder on this machine, else a hub name, downloaded once and cached.

    source  a folder, or `gpt2`, `gpt2-medium`, `gpt2-large`, `gpt2-xl`, `owner/name` or `owner/name@revision`
    Raises UserError where it is neither, or where the hub cannot be reached: it says how to provide a folder.
    """
    if Path(source).is_dir():
        return Path(source)
    match = NAME.fullmatch(os.fspath(source))
    if not isinstance(source, str) or match is None:
        raise UserError(f"{source}: no such folder; give a folder that holds config.json and model.safetensors")
    name = match["name"]
    known = REVISIONS.get(name.removeprefix("openai-community/"))
    revision = match["revision"] or known
    return _cached(name, revision) or _download(name, revision)


def _cached(name: str, revision: str | None) -> Path | None:
    """The cached folder of a name at a fixed commit; a name that may move is asked for anew."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if revision is None:
        return None
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=MODEL_FILES, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    # An interrupted download leaves a folder without its largest file.
    return folder if (folder / "model.safetensors").exists() else None


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    help_offline = (
        f"or give a folder that holds config.json, model.safetensors, vocab.json and merges.txt: on a machine with a "
        f"network, `hf download {name}{f' --revision {revision}' if revision else ''} --local-dir FOLDER`"
    )
    commit = commit_of(name, revision, kind="model", advice=help_offline)
    try:
        return Path(snapshot_download(name, revision=commit, allow_patterns=MODEL_FILES))
    except Exception as error:  # the client's errors share no base class; none of them is hidden
        raise UserError(f"{name}: the download stopped ({first_line(error)}); run again, {help_offline}") from error


def commit_of(name: str, revision: str | None, *, kind: str, advice: str) -> str:
    """The commit that a hub name stands for, asked with a short patience; says it where no revision was given.

    kind  "model" or "dataset";  advice  what to do without the hub, for the error
    """
    from huggingface_hub import HfApi

    ask = {"model": HfApi().model_info, "dataset": HfApi().dataset_info}[kind]
    try:
        commit = ask(name, revision=revision, timeout=SECONDS).sha
    except Exception as error:  # the client's errors share no base class; none of them is hidden
        raise UserError(
            f"{name}: no such file or folder here, and the Hugging Face hub gives no {kind} of this name "
            f"({first_line(error)}); check the name and the network, {advice}"
        ) from error
    if revision is None:
        print(f"{name}: at commit {commit}; write {name}@{commit} to stay with it", flush=True)
    return commit


def first_line(error: Exception) -> str:
    """An error's kind and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
