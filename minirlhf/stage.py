"""One stage's run from its first step to its last: the log, the checkpoints, and what happens when it is stopped.

    stage = Stage(folder, config, inputs=files, resume=config.resume)
    if stage.finished:                                    # by an earlier run, which --resume leaves as it is
        return ...
    with stage.begin(state, steps=total_steps):           # fills `state` from the newest checkpoint
        while state.step < total_steps:
            ...                                           # the step itself stands in the script
            stage.finish(step, metrics, tokens=...)       # a row in the log, and a checkpoint where one is due
        ...                                               # write the model; leaving the block marks the stage finished

A step is done when its row is written. Whatever ends the process before (a signal, an error, no more memory) drops the
unfinished step: just before the first optimizer step within it the state is copied, and that copy is what is saved.
The copy is as large as a checkpoint and lives from there to the end of the training step, when no activations do.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.optim import Optimizer

from minirlhf import checkpoint
from minirlhf.checkpoint import DiskFull, Manifest, Parts
from minirlhf.metrics import LOGS, RunLog, Value, file_hash, source_hash, versions
from minirlhf.runtime import DivergenceError, UserError, held_signals, require

MARKER = "stage.json"  # says whether the stage is finished, and then what it made
KEPT = 4  # checkpoints on the disk at a time: the newest two, the best, and the one that is being written


class Stage:
    """A stage's run in its folder.

    folder          runs/<name>/<stage>
    config          the stage's configuration, a dataclass
    inputs, models  files and models (folders or names) that it reads: a run goes on with the same ones only
    resume          go on with what stands in the folder; else that is moved aside
    """

    def __init__(
        self,
        folder: Path,
        config: Any,
        *,
        inputs: Sequence[Path | str],
        models: Sequence[Path | str] = (),
        resume: bool,
    ) -> None:
        self.folder, self.config, self.resume = folder, config, resume
        self.inputs, self.models = inputs, models
        self.root = folder / "checkpoints"
        self.done = self.saved = 0  # steps that are finished, and how many of them the newest checkpoint holds
        self._undo: Parts | None = None  # the state before the unfinished step, once that has changed it
        self._quality: float | None = None

    @property
    def finished(self) -> bool:
        """True where the run is to be resumed and an earlier one finished this stage with the same settings.

        Raises UserError where settings or inputs have changed since, or a file that the stage made.
        """
        path = self.folder / MARKER
        marker = self._marker() if self.resume else {}
        if not marker.get("finished"):
            return False
        checkpoint.check_same(path, marker, vars(self.config), self._hashes())
        made = self._outputs()
        for name, digest in marker["outputs"].items():
            state = "missing" if name not in made else "altered"
            again = f"remove {path} and use --resume: it is made again from the last checkpoint"
            require(made.get(name) == digest, f"{self.folder / name}: {state} since the stage finished; {again}")
        print(f"{self.folder.name}: is finished")
        return True

    def begin(
        self,
        state: object | None,
        *,
        steps: int,
        checkpoint_every: int = 1,
        best: tuple[str, Literal["min", "max"]] | None = None,
    ) -> Self:
        """Open the log; where the run is resumed, fill `state` from the newest checkpoint. Use it in a `with`.

        state             the stage's State; None for a stage of one step, which has no checkpoints and starts again
        steps             steps (iterations of PPO) of the whole stage
        checkpoint_every  steps between two checkpoints; there is always one after the last step
        best              metric by which the best checkpoint is kept, and whether "min" or "max" is best
        Raises UserError where the run cannot go on (see `checkpoint.load`), or the disk is too full to begin.
        """
        require(checkpoint_every >= 1, f"--checkpoint-every {checkpoint_every}: must be at least 1")
        self.state, self.steps, self.checkpoint_every, self.best = state, steps, checkpoint_every, best
        self.nbytes = checkpoint.expected(state).nbytes if state is not None else 0
        self._hashes()  # now: what is read may be in a folder that is moved aside
        checkpoint.clean(self.root)
        manifest = self._continue() if self.resume else None
        keep = {name: entry["size"] for name, entry in manifest.logs.items()} if manifest else None
        self.log = RunLog(
            self.folder,
            self.config,
            inputs=self.inputs,
            models=self.models,
            steps=steps,
            keep=keep,
            done=self.done,
        )
        checkpoint.write_atomically(self.folder / MARKER, json.dumps({"finished": False}))
        there = len(list(self.root.glob("[0-9]*")))
        checkpoint.require_space(self.folder, (KEPT - min(there, KEPT - 1)) * self.nbytes)
        return self

    def _continue(self) -> Manifest | None:
        """Fill the state from the newest checkpoint; without one, clear away what a killed process had begun."""
        newest = checkpoint.latest(self.root) if self.state is not None else None
        if newest is None:
            self._clear()
            return None
        name = self.folder.name
        manifest = checkpoint.load(newest, self.state, stage=name, config=vars(self.config), inputs=self._hashes())
        self.done = self.saved = manifest.step
        print(f"{name}: continues after step {self.done} of {self.steps}")
        if manifest.versions != versions():
            print(f"{name}: began with {manifest.versions}, now {versions()}: last digits may differ")
        return manifest

    def _clear(self) -> None:
        """Delete a folder that a killed process had begun; one that holds anything else is left to be moved aside."""
        if self.folder.is_symlink() or not self.folder.is_dir():
            return
        names = {path.name for path in self.folder.iterdir() if not path.name.startswith(".saving-")}
        begun = {"run.json", MARKER, self.root.name, *LOGS}
        if self.state is None and self._marker().get("finished") is False:
            begun |= {"rankings.jsonl"}
        if names <= begun:
            shutil.rmtree(self.folder)

    def __enter__(self) -> Self:
        fields = vars(self.state).values() if self.state is not None else ()
        optimizers = [value for value in fields if isinstance(value, Optimizer)]
        self._hooks = [optimizer.register_step_pre_hook(self._before_update) for optimizer in optimizers]
        return self

    def _before_update(self, *_: object) -> None:
        """Keep the state before the first optimizer step within a training step."""
        if self._undo is None:
            with held_signals():
                self._undo = checkpoint.parts(self.state).clone()

    def finish(self, step: int, metrics: Mapping[str, Value], *, tokens: int) -> None:
        """The step is done: write its row, and a checkpoint where one is due; `tokens` were processed in it."""
        values = {name: float(value) for name, value in metrics.items()}
        with held_signals():
            self.log.row(step, values, tokens=tokens)
            self.done, self._undo = step + 1, None
            name, direction = self.best or ("", "max")
            self._quality = values[name] * (1 if direction == "max" else -1) if name in values else None
            if self.state is not None and (self.done % self.checkpoint_every == 0 or self.done == self.steps):
                self.save()

    def save(self) -> None:
        """Write a checkpoint of the last finished step."""
        manifest = Manifest(
            stage=self.folder.name,
            step=self.done,
            config={name: checkpoint.plain(value) for name, value in vars(self.config).items()},
            inputs=self._hashes(),
            logs=self.log.sync(),
            versions=versions(),
            quality=self._quality,
        )
        checkpoint.save(self.root, self._undo or checkpoint.parts(self.state), manifest)
        self.saved = self.done

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()
        reason = self._explain(error) if error is not None else None
        if error is not None and not isinstance(reason, DiskFull):
            self._save_last()
        self.log.close()
        if error is None:
            self._mark_finished()
        elif reason is not error:
            raise reason from error

    def _save_last(self) -> None:
        """Save the last finished step on the way out of an error, which stays the one that is reported."""
        name = self.folder.name
        try:
            if self.state is not None and self.done > self.saved:
                self.save()
        except (UserError, OSError) as failure:
            print(f"{name}: step {self.done} could not be saved: {failure}", file=sys.stderr)
        if self.saved:
            print(f"{name}: step {self.saved} of {self.steps} is saved; --resume continues from there", file=sys.stderr)

    def _explain(self, error: BaseException) -> BaseException:
        """The error with stage, step and a way out in words, where a setting can cause it; else the error itself."""
        where = f"{self.folder.name}, step {self.done}"
        if isinstance(error, DivergenceError):
            return DivergenceError(f"{where}: {error}")
        if _is_out_of_memory(error):
            return UserError(f"{where}: out of memory {_batch_and_smaller(self.config)}")
        return checkpoint.disk_full(error, self.folder, self.nbytes) or error

    def _marker(self) -> dict[str, Any]:
        """What stage.json says; empty where there is none."""
        path = self.folder / MARKER
        marker = checkpoint.read_json(path) if path.exists() else {}
        require(isinstance(marker, dict), f"{path}: not a JSON object; remove it")
        return marker

    def _mark_finished(self) -> None:
        """Write the marker with the hashes of all that the stage made, last of all."""
        marker = {
            "finished": True,
            "config": {name: checkpoint.plain(value) for name, value in vars(self.config).items()},
            "inputs": self._hashes(),
            "outputs": self._outputs(),
        }
        checkpoint.write_atomically(self.folder / MARKER, json.dumps(marker, indent=1))

    def _outputs(self) -> dict[str, str]:
        """Hashes of the files in the stage's folder, by name; the checkpoints have their own."""
        made = [path for path in sorted(self.folder.rglob("*")) if path.is_file() and not path.is_symlink()]
        made = [path for path in made if self.root not in path.parents and path.name != MARKER]
        return {path.relative_to(self.folder).as_posix(): file_hash(path) for path in made}

    def _hashes(self) -> dict[str, str]:
        """Hashes of what the stage reads, by path; taken once."""
        if not hasattr(self, "_known_hashes"):
            self._known_hashes = {str(path): source_hash(path) for path in (*self.inputs, *self.models)}
        return self._known_hashes


def require_finite(**tensors: Tensor) -> None:
    """Raise DivergenceError naming the first tensor that holds a nan or an infinity; goes before the optimizer step."""
    for name, tensor in tensors.items():
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            what = f"is {tensor.item()}" if tensor.ndim == 0 else f"has {bad} of {tensor.numel()} values not finite"
            raise DivergenceError(
                f"{name.replace('_', ' ')} {what}: stopped before the optimizer step; try a lower learning rate"
            )


def _is_out_of_memory(error: BaseException) -> bool:
    # The CPU's allocator raises a plain RuntimeError.
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def _batch_and_smaller(config: Any) -> str:
    """The batch, the peak of memory, and the flag values to try."""
    names = ("micro_batch_tokens", "batch_size", "rollout_size")
    flags = {f"--{n.replace('_', '-')}": getattr(config, n) for n in names if hasattr(config, n)}
    batch = " ".join(f"{flag} {value}" for flag, value in flags.items())
    smaller = ", then ".join(f"{flag} {max(value // 2, 1)}" for flag, value in flags.items())
    return (
        f"with {batch}; the peak was {_peak_bytes() / 2**30:.2f} GiB. Try {smaller}; the first changes no result and "
        "goes with --resume"
    )


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource  # not on every system, and needed only here

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
