"""Names on the Hugging Face hub, at fixed revisions: model folders and where a data set stands.

A folder on this machine always comes first. Downloads go to the hub's own cache and are not repeated; a name without
a revision is resolved once to the commit that it stands for now, and that commit is said.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from minirlhf.runtime import UserError

# The commits that hold OpenAI's weights as safetensors.
REVISIONS = {
    "gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "gpt2-medium": "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
    "gpt2-large": "32b71b12589c2f8d625668d2335a01cac3249519",
    "gpt2-xl": "15ea56dee5df4983c59b2538573817e1667135e2",
}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"  # large models come in parts that the index names
# No pickled weights: they are never downloaded.
MODEL_FILES = ["config.json", WEIGHTS, INDEX, "model-*.safetensors", "vocab.json", "merges.txt"]
NAME = re.compile(r"(?P<name>\w[\w.-]*(/\w[\w.-]*)?)(@(?P<revision>[\w./-]+))?")
SECONDS = 1.5  # to wait for the hub's first answer, unless HF_HUB_ETAG_TIMEOUT says otherwise


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
    fixed = REVISIONS.get(name.removeprefix("openai-community/"))
    revision = match["revision"] or fixed
    return _cached(name, revision) or _download(name, revision)


def model_or_earlier(named: str | None, flag: str, folder: Path, *, data: str | None = None) -> Path:
    """The folder of the model that `flag` names, else `folder`, <run>/<stage>/model, where an earlier stage left one.

    data  the comparisons that the user gave, from which `train_sft.py` learns the better answers
    Raises UserError that says which command makes the model where there is none.
    """
    if named is None and not (folder / "config.json").is_file():
        stage, run = folder.parent.name, folder.parent.parent
        command = f"python train_{stage}.py --run {run}{f' --train {data}' if data else ''}"
        raise UserError(f"{folder}: no model yet; run `{command}` first, or name a model with {flag}")
    return model_folder(named or folder)


def weight_files(folder: Path) -> list[Path]:
    """The files with a folder's weights: model.safetensors, else the parts that its index names, else none.

    Raises UserError where the index is not one. A part may be missing, and is then still in the list.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        return []
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        plain = all(Path(name).name == name for name in names)  # a path could lead out of the folder
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not an index of weights ({first_line(error)}); save the model again") from error
    if not names or not plain:
        raise UserError(f"{index}: weight_map must name files beside it; save the model again")
    return [folder / name for name in names]


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
    # An interrupted download leaves a folder without its largest files.
    files = weight_files(folder)
    return folder if files and all(file.exists() for file in files) else None


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
    from huggingface_hub import HfApi, constants

    ask: Any = HfApi().model_info if kind == "model" else HfApi().dataset_info
    seconds = constants.HF_HUB_ETAG_TIMEOUT if "HF_HUB_ETAG_TIMEOUT" in os.environ else SECONDS
    try:
        commit = _in_time(lambda: ask(name, revision=revision, timeout=seconds).sha, seconds)
    except Exception as error:  # the client's errors share no base class; none of them is hidden
        raise UserError(
            f"{name}: no such file or folder here, and the Hugging Face hub gives no {kind} of this name "
            f"({first_line(error)}); check the name and the network, {advice}"
        ) from error
    if revision is None:
        print(f"{name}: at commit {commit}; write {name}@{commit} to stay with it", flush=True)
    return commit


def _in_time(ask: Callable[[], Any], seconds: float) -> Any:
    """The answer of `ask`; raises TimeoutError after `seconds`, where a silent name server would take longer."""
    answer: Future[Any] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except Exception as error:  # raised again below
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return answer.result(timeout=seconds)
    except TimeoutError:
        raise TimeoutError(f"no answer in {seconds:g} seconds; HF_HUB_ETAG_TIMEOUT=30 waits longer") from None


def first_line(error: Exception) -> str:
    """An error's kind and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
