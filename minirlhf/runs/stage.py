"""One stage's run from its first step to its last: the log, the checkpoints, and what happens when it is stopped.

    stage = Stage(config, "ppo", inputs=files)
    if stage.finished:                                    # by an earlier run, which --resume leaves as it is
        return stage.output
    if config.dry_run:
        return stage.show(plan)                           # says what would be done
    with stage.begin(state, steps=total_steps):           # fills `state` from the newest checkpoint
        while state.step < total_steps:
            for attempt in stage.attempts():              # again with smaller micro-batches where memory runs out
                with attempt as max_tokens:
                    train_step(..., max_tokens=max_tokens)
            stage.finish(step, metrics, tokens=...)       # a row in the log, and a checkpoint where one is due
        stage.save(model, encoding, objective="...")      # leaving the block marks the stage finished

A training step (an iteration of PPO) is done when its row is written. A signal that stops the process acts at once
until the first optimizer step within it, and the last finished step is saved. From there to `finish` the state is that
of no step, so the signal waits, and the run saves and stops after this step; a second one ends the process at once. An
error in between saves nothing. Of several processes all hold the state and one writes; they stop after the same step.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import tiktoken
import torch
from torch.optim import Optimizer

from minirlhf import distributed, tokenizer
from minirlhf.config import RunConfig
from minirlhf.files import source_hash
from minirlhf.optim import allocate_moments
from minirlhf.runs import checkpoint
from minirlhf.runs import plan as planning
from minirlhf.runs.card import write_model_card
from minirlhf.runs.checkpoint import MARKER, DiskFull, Manifest
from minirlhf.runs.health import HINTS, Hints
from minirlhf.runs.log import LOGS, RunLog, Value, read_rows, require_tracker, versions
from minirlhf.runtime import DivergenceError, Interrupted, SignalGate, UserError, is_out_of_memory, require

MOST_CHECKPOINTS = 4  # checkpoints on the disk at a time: the newest two, the best, and the one that is being written


class Stage:
    """A stage's run in its folder, `<run>/<name>`.

    config          the stage's configuration; with `resume` the run goes on with what stands in the folder, else that
                    is moved aside
    inputs, models  files and models (folders or names) that it reads: a run goes on with the same ones only
    """

    def __init__(
        self, config: RunConfig, name: str, *, inputs: Sequence[Path | str], models: Sequence[Path | str] = ()
    ) -> None:
        self.folder, self.config, self.resume = config.run / name, config, config.resume
        self.output = self.folder / "model"
        self.inputs, self.models = inputs, models
        self.root = self.folder / "checkpoints"
        self.done = self.saved = 0  # steps that are finished, and how many of them the newest checkpoint holds
        self._updates = 0  # optimizer steps within the training step; from the first the state is that of no step
        self._gate = SignalGate(f"{name}: stopping after this step; once more to leave at once")
        self._quality: float | None = None
        planning.require_number_for_several(config)
        require_tracker(getattr(config, "track", None))
        checkpoint.require_writable(self.folder)

    @property
    def finished(self) -> bool:
        """True where the run is to be resumed and an earlier one finished this stage with the same settings.

        Raises UserError where settings or inputs have changed since, or a file that the stage made.
        """
        path = self.folder / MARKER
        marker = checkpoint.read_marker(self.folder) if self.resume else {}
        if not marker.get("finished"):
            newest = checkpoint.latest(self.root) if self.resume else None
            if newest is not None:  # its tensors are read later, into the models
                checkpoint.check(newest, stage=self.folder.name, config=vars(self.config), inputs=self.hashes)
            return False
        checkpoint.check_same(path, marker, vars(self.config), self.hashes)
        made = checkpoint.outputs(self.folder)
        for name, digest in marker["outputs"].items():
            state = "missing" if name not in made else "altered"
            again = f"remove {path} and use --resume: it is made again from the last checkpoint"
            require(made.get(name) == digest, f"{self.folder / name}: {state} since the stage finished; {again}")
        print(f"{self.folder.name}: is finished")
        return True

    def show(self, plan: planning.Plan) -> Path:
        """Print what the stage would do (`--dry-run`); returns the folder that its model would be in."""
        planning.show_plan(plan, self.config)
        return self.output

    def save(self, model: Any, encoding: tiktoken.Encoding, *, objective: str) -> None:
        """Write the trained GPT or RewardModel, its tokenizer and a card that says the `objective` in a sentence."""
        if distributed.is_writer():
            model.save_pretrained(self.output)
            tokenizer.save(encoding, self.output)
            script = Path(inspect.getfile(type(self.config))).name
            write_model_card(self.output, script=script, objective=objective)

    def begin(self, state: Any, *, steps: int, best: tuple[str, Literal["min", "max"]] | None = None) -> Self:
        """Open the log; where the run is resumed, fill `state` from the newest checkpoint. Use it in a `with`.

        state  the stage's State; None for a stage of one step, which has no checkpoints and starts again
        steps  steps (iterations of PPO) of the whole stage; there is always a checkpoint after the last
        best   metric by which the best checkpoint is kept, and whether "min" or "max" is best
        Raises UserError where the run cannot go on (see `checkpoint.load`), or the disk is too full to begin.
        """
        self.state, self.steps, self.best = state, steps, best
        self.checkpoint_every = getattr(self.config, "checkpoint_every", 1)
        fields = vars(state).values() if state is not None else ()
        self._optimizers = [value for value in fields if isinstance(value, Optimizer)]
        self._allocate()
        self.nbytes = checkpoint.parts(state).nbytes if state is not None else 0
        with contextlib.ExitStack() as locked:
            if distributed.is_writer():
                locked.enter_context(checkpoint.only_writer(self.folder))
            self._begin()
            self._lock = locked.pop_all()
        return self

    def _allocate(self) -> None:
        """Make the optimizers' moments, so that the state is of its full size from here on."""
        try:
            for optimizer in self._optimizers:
                allocate_moments(optimizer)
        except (RuntimeError, MemoryError) as error:
            where = f"{self.folder.name}: out of memory for the optimizer's moments"
            require(not is_out_of_memory(error), f"{where}; take a smaller model or another --device")
            raise

    def _begin(self) -> None:
        """In every process: the writer opens the folder, then the others read what it goes on from."""
        _ = self.hashes  # taken now: what is read may be in a folder that is moved aside
        distributed.barrier()  # and every process has read it
        if distributed.is_writer():
            self._open()
        distributed.barrier()
        if self.resume and not distributed.is_writer():
            self._continue()
        self._require_same()

    def _open(self) -> None:
        """Go on with what stands in the folder, or begin with an empty one: the log, the marker, room on the disk."""
        checkpoint.clean(self.root)
        manifest = self._continue() if self.resume else None
        if self.resume and manifest is None:
            results = {"rankings.jsonl"} if self.state is None else set()
            checkpoint.clear_begun(self.folder, logs={*LOGS, HINTS, "trace.jsonl"}, results=results)
        keep = {name: entry["size"] for name, entry in manifest.logs.items()} if manifest else None
        read = {kind: {str(p): self.hashes[str(p)] for p in getattr(self, kind)} for kind in ("inputs", "models")}
        self.log = RunLog(self.folder, self.config, **read, steps=self.steps, keep=keep, done=self.done)
        rows = read_rows(self.folder) if manifest else ()
        self.hints = Hints(self.folder, self.config, steps=self.steps, rows=rows)
        checkpoint.mark(self.folder, finished=False)
        there = len(list(self.root.glob("[0-9]*")))
        checkpoint.require_space(self.folder, (MOST_CHECKPOINTS - min(there, MOST_CHECKPOINTS - 1)) * self.nbytes)

    def _continue(self) -> Manifest | None:
        """Fill the state from the newest checkpoint; None without one."""
        newest = checkpoint.latest(self.root) if self.state is not None else None
        if newest is None:
            return None
        name = self.folder.name
        manifest = checkpoint.load(newest, self.state, stage=name, config=vars(self.config), inputs=self.hashes)
        self.done = self.saved = manifest.step
        print(f"{name}: continues after step {self.done} of {self.steps}")
        if manifest.versions != versions():
            print(f"{name}: began with {manifest.versions}, now {versions()}: last digits may differ")
        return manifest

    def _require_same(self) -> None:
        """Raise UserError unless all processes have the same settings, inputs, checkpoint and weights."""
        if distributed.world_size() > 1:
            config = {name: value for name, value in vars(self.config).items() if name not in checkpoint.CHANGEABLE}
            tensors = checkpoint.parts(self.state).tensors if self.state is not None else {}
            # Of the bits, as integers: the order of adding up must not matter.
            sums = {n: int(t.reshape(-1).view(torch.int16).sum(dtype=torch.int64)) for n, t in tensors.items()}
            other = distributed.differing(f"{config} {list(self.hashes.values())} {self.done} {sums}")
            same = "give every machine the same command, files and run folder"
            require(not other, f"{self.folder.name}: process {other} and process 0 would not train the same: {same}")

    def __enter__(self) -> Self:
        self._hooks = [optimizer.register_step_pre_hook(lambda *_: self.hold()) for optimizer in self._optimizers]
        if distributed.world_size() > 1:  # a process that stops alone would leave the others waiting
            self._gate.close()
        return self

    def hold(self) -> None:
        """From here to `finish` the state is that of no step, and signals wait; called before each optimizer step."""
        self._gate.close()
        self._updates += 1

    @property
    def micro_batch_tokens(self) -> int:
        """Padded tokens per forward pass; with `--micro-batch-tokens auto`, as many as have been found to fit."""
        return planning.micro_batch_tokens(self.config, self.state)

    def attempts(self) -> Iterator[AbstractContextManager[int]]:
        """Attempts at one optimizer step, each a context that gives `micro_batch_tokens`, until one comes to its end.

        Where `--micro-batch-tokens` is `auto` and memory runs out before the optimizer steps, the next attempt has half
        as many tokens per forward pass. The gradient is the same whatever their number.
        """
        tokens = 0
        while tokens != self.micro_batch_tokens:
            tokens = self.micro_batch_tokens
            yield self._attempt(tokens)

    @contextlib.contextmanager
    def _attempt(self, tokens: int) -> Iterator[int]:
        updates = self._updates
        try:
            yield tokens
        except Exception as error:
            again = planning.is_auto(self.config) and tokens > 1 and self._updates == updates
            if not (again and is_out_of_memory(error)):
                raise
            self.state.fitted_tokens = tokens // 2
        else:
            return
        torch.clear_autocast_cache()
        print(f"{self.folder.name}: {tokens:,} tokens per forward pass do not fit, now {tokens // 2:,}", flush=True)

    def finish(self, step: int, metrics: Mapping[str, Value], *, tokens: int) -> None:
        """The step is done: write its row, and a checkpoint where one is due; `tokens` were processed in it."""
        self.hold()
        values = {name: float(value) for name, value in metrics.items()}
        if distributed.is_writer():
            self.log.row(step, values, tokens=tokens)
        self.done, self._updates = step + 1, 0
        if distributed.is_writer():
            for hint in self.hints.see({"step": step, **values}):
                self.log.say(f"hint: {self.folder.name}, {hint}")
            name, direction = self.best or ("", "max")
            self._quality = values[name] * (1 if direction == "max" else -1) if name in values else None
            if self.state is not None and (self.done % self.checkpoint_every == 0 or self.done == self.steps):
                self.save_checkpoint()
        self._stop_where_asked()

    def _stop_where_asked(self) -> None:
        """Let a signal act that waited or was swallowed. In several processes it acts in all, and others still wait."""
        if distributed.world_size() == 1:
            self._gate.open()
            number = self._gate.raised
        else:
            number = int(distributed.all_max(torch.tensor(self._gate.waiting or self._gate.raised)))
        if number:  # and not otherwise: a signal may have come while the processes agreed that there was none
            self._gate.waiting = 0
            raise Interrupted(number)

    def save_checkpoint(self) -> None:
        """Write a checkpoint of the last finished step."""
        manifest = Manifest(
            stage=self.folder.name,
            step=self.done,
            config=checkpoint.plain(vars(self.config)),
            inputs=self.hashes,
            logs=self.log.sync(),
            versions=versions(),
            quality=self._quality,
        )
        checkpoint.save(self.root, checkpoint.parts(self.state), manifest)
        self.saved = self.done

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._lock:
            self._end(error)

    def _end(self, error: BaseException | None) -> None:
        for hook in self._hooks:
            hook.remove()
        reason = self._explain(error) if error is not None else None
        try:
            if distributed.is_writer():
                self._close(error, reason)
            if error is None:
                distributed.barrier()  # the next stage may read what this one has written
                self._stop_where_asked()
        finally:
            self._gate.waiting = 0  # an error is what is reported
            self._gate.open()
        if reason is not error and reason is not None:
            raise reason from error

    def _close(self, error: BaseException | None, reason: BaseException | None) -> None:
        """Save the last finished step after an error, end the log, mark the stage finished where it is."""
        if error is not None and not isinstance(reason, DiskFull):
            self._save_last()
        self.log.close()
        if error is None:
            made, config = checkpoint.outputs(self.folder), checkpoint.plain(vars(self.config))
            checkpoint.mark(self.folder, finished=True, config=config, inputs=self.hashes, outputs=made)

    def _save_last(self) -> None:
        """Save the last finished step on the way out of an error, which stays the one that is reported."""
        name = self.folder.name
        try:
            if self.state is not None and self.done > self.saved and not self._updates:
                self.save_checkpoint()
        except (UserError, OSError) as failure:
            print(f"{name}: step {self.done} could not be saved: {failure}", file=sys.stderr)
        if self.saved:
            print(f"{name}: step {self.saved} of {self.steps} is saved; --resume continues from there", file=sys.stderr)

    def _explain(self, error: BaseException) -> BaseException:
        """The error with stage, step and a way out in words, where a setting can cause it; else the error itself."""
        where = f"{self.folder.name}, step {self.done}"
        if isinstance(error, DivergenceError):
            return DivergenceError(f"{where}: {error}")
        if is_out_of_memory(error):
            return UserError(f"{where}: {planning.explain_memory(self.config, self.micro_batch_tokens)}")
        return checkpoint.disk_full(error, self.folder, self.nbytes) or error

    @functools.cached_property
    def hashes(self) -> dict[str, str]:
        """Hashes of what the stage reads, by path."""
        return {str(path): source_hash(path) for path in (*self.inputs, *self.models)}
