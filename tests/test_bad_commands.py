"""Mistakes on the command line of the four scripts, in one table: exit code 2, one clear error that names the flag or
`file:line`, no traceback, and no weights loaded before it.

Most rows run in this process through the scripts' own entry point; some are real command lines.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import tiny
import torch
from test_bad_input import CASES
from test_resume import MODULES

from minirlhf import tokenizer
from minirlhf.config import run_script
from minirlhf.files import write_records
from minirlhf.hf import folder
from minirlhf.model import GPT, GPTConfig
from minirlhf.reward import RewardModel
from minirlhf.runs import checkpoint

ROOT = Path(__file__).parent.parent
PAIR = {"prompt": "p:", "chosen": " a", "rejected": " b"}
# (script, flags, words of the error). `{run}` is the folder of a finished run, `{file}` a folder of prepared files.
ROWS: list[tuple[str, str, str]] = [
    # numbers out of range; test_settings.py goes through every numeric field
    ("sft", "--learning-rate -1", "--learning-rate -1.0: must be at least 0"),
    ("sft", "--learning-rate nan", "--learning-rate nan: must be a finite number"),
    ("sft", "--batch-size 0", "--batch-size 0: must be at least 1"),
    ("sft", "--validation-share 1", "--validation-share 1.0: must be above 0 and below 1"),
    ("sft", "--checkpoint-every 0", "--checkpoint-every 0: must be at least 1"),
    ("reward", "--micro-batch-tokens 0", "--micro-batch-tokens 0: must be at least 1"),
    ("reward", "--epochs inf", "--epochs inf: must be a finite number"),
    ("reward", "--seed -1", "--seed -1: must be at least 0"),
    ("reward", "--reference-samples 1", "--reference-samples 1: must be at least 2"),
    ("ppo", "--beta -0.1", "--beta -0.1: must be at least 0"),
    ("ppo", "--clip 0", "--clip 0.0: must be above 0"),
    ("ppo", "--value-clip 0", "--value-clip 0.0: must be above 0"),
    ("ppo", "--adam-eps 0", "--adam-eps 0.0: must be above 0"),
    ("ppo", "--gamma 1.01", "--gamma 1.01: must be at least 0 and at most 1"),
    ("ppo", "--lam -0.5", "--lam -0.5: must be at least 0 and at most 1"),
    ("ppo", "--temperature 0", "--temperature 0.0: must be above 0"),
    ("ppo", "--missing-eos-score nan", "--missing-eos-score nan: must be a finite number"),
    ("ppo", "--kl-target 0", "--kl-target 0.0: must be above 0"),
    ("dpo", "--beta 0", "--beta 0.0: must be above 0"),
    ("dpo", "--label-smoothing 0.6", "--label-smoothing 0.6: must be at least 0 and at most 0.5"),
    ("dpo", "--max-grad-norm 0", "--max-grad-norm 0.0: must be above 0"),
    # settings that do not fit each other or the data
    ("sft", "--n-embd 30 --n-head 4", "--n-embd 30: must be a multiple of --n-head 4"),
    ("sft", "--batch-size 21", "--batch-size 21: larger than the 20 there are to learn from; give at most 20"),
    ("sft", "--epochs 0.01", "--epochs 0.01: not a single step of 8"),
    ("sft", "--n-positions 3", "too little to learn from and hold out"),
    ("sft", "--n-positions 96 --validation {file}/long.jsonl", "too little to learn from and hold out"),
    ("sft", "--train {file}/one.jsonl --validation None", "too little to learn from and hold out"),
    ("sft", "--validation None --validation-split [:3]", "--validation-split: is a part of --validation"),
    ("reward", "--batch-size 99", "--batch-size 99: larger than the"),
    ("reward", "--max-new-tokens 600", "--max-new-tokens 600: the model's context leaves no room for a prompt"),
    ("reward", "--comparisons {file}/pair.jsonl", "pair.jsonl: 1 comparisons to learn from and 0 to hold out"),
    ("ppo", "--rollout-size 11", "--rollout-size 11: larger than the 10"),
    ("ppo", "--minibatches 7", "--minibatches 7: more than the 6 rows of a rollout"),
    ("ppo", "--no-whiten-advantages --advantages reinforce", "--no-whiten-advantages: --advantages reinforce does not"),
    ("ppo", "--max-new-tokens 600", "--max-new-tokens 600: the model's context leaves no room for a prompt"),
    ("ppo", "--prompts {file}/prompt.jsonl", "--rollout-size 6: larger than the 1"),
    ("dpo", "--batch-size 99", "--batch-size 99: larger than the"),
    ("dpo", "--comparisons {file}/pair.jsonl", "pair.jsonl: 1 comparisons to learn from and 0 to hold out"),
    ("dpo", "--stage ../x", "--stage ../x: must be a name of letters"),
    ("ppo", "--stage sft", "--stage sft: must be a name of letters, digits, '.', '-' and '_', and none of sft"),
    # flags and words that do not exist
    ("sft", "--learning-rat 1", "--learning-rate FLOAT"),
    ("reward", "--comparison x", "--comparisons {None}|STR"),
    ("ppo", "--whiten-reward", "--whiten-rewards"),
    ("dpo", "--dtype int8", "invalid choice 'int8' for argument '--dtype'"),
    ("dpo", "--micro-batch-tokens some", "--micro-batch-tokens"),
    ("dpo", "--batch-size 1.5", "Error parsing --batch-size: invalid literal"),
    ("sft", "--preset large", "--preset large: not one of tiny, gpt2"),
    ("sft", "--device mps", "--device mps: not available on this machine; use --device auto or cpu"),
    # files and folders
    ("sft", "--train {file}/missing.jsonl", "missing.jsonl: no such file"),
    ("sft", "--train {file}", ": a folder; give one file"),
    ("dpo", "--comparisons ", "--comparisons: is blank; leave it out for the default"),
    ("dpo", "--comparisons {run}/train.jsonl", "train.jsonl:1: no pairs can be read"),
    ("reward", "--comparisons {run}/train.jsonl --columns chosen=answer", "train.jsonl:1: no field 'answer'"),
    ("sft", "--train {run}/train.jsonl --split test", "--split test: a file has no splits"),
    ("ppo", "--prompts {file}/blank.jsonl", "blank.jsonl:2: the prompt is blank"),
    ("sft", "--run {file}/prompt.jsonl/run", "prompt.jsonl is not a folder; give another --run"),
    ("dpo", "--run {file}/prompt.jsonl --policy {run}/sft/model --comparisons {file}/pair.jsonl", "is not a folder"),
    ("sft", "--model {file}/nothing", "nothing: no such folder"),
    ("dpo", "--policy {file}", "config.json: no such file"),
    ("reward", "--model {file}/broken", "config.json: not JSON"),
    ("dpo", "--policy {file}/bert", "model_type is 'bert' (supported: 'gpt2')"),
    ("ppo", "--reward-model {file}/nothing", "nothing: no such folder"),
    # vocabularies
    (
        "sft",
        "--model {run}/sft/model --tokenizer bytes",
        "the tokenizer 'bytes' has 257 ids, the model",
    ),
    ("reward", "--model {file}/other", "the model a vocabulary of 7; give the tokenizer"),
    ("dpo", "--policy {file}/other", "the model a vocabulary of 7; give the tokenizer"),
    ("ppo", "--reward-model {file}/other", "the model a vocabulary of 7; give the tokenizer"),
    ("sft", "--tokenizer {file}", "no tokenizer in"),
    # a run that cannot go on
    ("dpo", "--resume --beta 0.4", "--beta 0.4 (was 0.3); --resume needs the same"),
    ("dpo", "--resume --stage dpo2", "manifest.json: of the stage dpo, not dpo2"),
    ("dpo", "--resume --stage dpo3", "manifest.json: not what was written"),
]
# Malformed files, each met by a script that reads such a file.
MALFORMED = [
    *("a byte order mark", "UTF-16", "NaN", "a key twice", "a broken line", "a lone surrogate", "an unknown role"),
    *("a number for a text", "a blank prompt", "damaged gzip", "ranks of another length", "an empty file"),
]
READ_BY = {"demonstrations": "sft --train", "pairs": "dpo --comparisons", "prompts": "ppo --prompts"}
for name, _, kind, line, _ in CASES:
    if name in MALFORMED:
        place = f"bad-{MALFORMED.index(name)}.jsonl" + (f":{line}: " if line else ": ")
        script, flag = READ_BY[kind].split()
        ROWS.append((script, f"{flag} {{file}}/bad-{MALFORMED.index(name)}.jsonl", place))
# Rows that are also real command lines, started by the shell's own rules.
REAL = [
    ("sft", "--train {file}/bad-0.jsonl"),
    ("reward", "--seed -1"),
    ("dpo", "--resume --beta 0.4"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("bad"))


def make_files(folder: Path) -> Path:
    """What the rows name, and a run under `run` whose DPO was stopped before its end."""
    for name, content, *_ in CASES:
        if name in MALFORMED:
            (folder / f"bad-{MALFORMED.index(name)}.jsonl").write_bytes(content)
    write_records(folder / "pair.jsonl", [PAIR])
    write_records(folder / "one.jsonl", [{"prompt": "p:", "response": " r"}])
    write_records(folder / "long.jsonl", [{"prompt": "p:", "response": " r" * 500}])
    write_records(folder / "prompt.jsonl", [{"prompt": "p:"}])
    write_records(folder / "blank.jsonl", [{"prompt": "p:"}, {"prompt": " "}])
    for name, config in (("broken", "{"), ("bert", json.dumps({"model_type": "bert"}))):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(config)
    GPT(GPTConfig(vocab_size=7, n_positions=96, n_layer=1, n_head=1, n_embd=4)).save_pretrained(folder / "other")
    tokenizer.save(tiny.ENCODING, folder / "other")
    run = tiny.copy_of(tiny.finished_run(), folder / "run", "sft", "feedback", "reward", "dpo")
    (run / "dpo" / "stage.json").write_text('{"finished": false}')
    for name in ("dpo2", "dpo3"):
        shutil.copytree(run / "dpo", run / name)
    manifest = checkpoint.latest(run / "dpo3" / "checkpoints") / "manifest.json"
    manifest.write_text(manifest.read_text().replace("dpo", "dqo"))
    return folder


def command(script: str, flags: str, files: Path) -> list[str]:
    """The arguments: those of the table come last, so that they hold."""
    run = files / "run"
    inputs = {
        "sft": f"--train {run}/train.jsonl --validation {run}/validation.jsonl --n-layer 1 --batch-size 8",
        "reward": f"--reference-prompts {run}/prompts.jsonl --batch-size 5 --max-new-tokens 8",
        "ppo": f"--prompts {run}/prompts.jsonl --rollout-size 6 --minibatches 2 --max-new-tokens 8",
        "dpo": "",
    }[script]
    if script == "dpo":
        config = tiny.dpo_config(run)
        names = ("validation_share", "epochs", "batch_size", "beta", "learning_rate", "warmup_steps", "seed")
        inputs = " ".join(f"--{n.replace('_', '-')} {getattr(config, n)}" for n in (*names, "validation_every"))
    given = [word.format(run=run, file=files) for word in flags.split(" ")]
    return ["--run", str(run), "--device", "cpu", *inputs.split(), *given]


def tree(folder: Path) -> dict[str, int]:
    """What stands in a folder, and when it was last written."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def assert_clear(code: int, said: str, words: str) -> None:
    """One error: a line of its own, or the box that says what is wrong with a flag."""
    plain = re.sub(r"[│╭╮╰╯─\s]+", " ", said)
    assert code == 2 and words in plain and "Traceback" not in said, said
    assert (said.startswith("error: ") and said.count("\n") == 1) or "For full helptext" in plain, said


@pytest.mark.parametrize(("script", "flags", "words"), ROWS, ids=[f"{row[0]} {row[1]}" for row in ROWS])
def test_a_mistake_is_one_clear_error_before_any_weights(
    script: str,
    flags: str,
    words: str,
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    module: ModuleType = MODULES[script]
    before = tree(files)
    monkeypatch.setattr(folder, "safe_open", loaded)
    for kind in (GPT, RewardModel):
        monkeypatch.setattr(kind, "from_pretrained", loaded)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [f"train_{script}.py", *command(script, flags, files)])
    with pytest.raises(SystemExit) as stop:
        run_script(module.main, module.PRESETS, several=True)
    assert_clear(stop.value.code, capsys.readouterr().err, words)
    assert tree(files) == before


@pytest.mark.parametrize(("script", "flags"), REAL, ids=[f"{script} {flags}" for script, flags in REAL])
def test_real_command_lines(script: str, flags: str, files: Path) -> None:
    words = next(row[2] for row in ROWS if row[:2] == (script, flags))
    line = [sys.executable, str(ROOT / f"train_{script}.py"), *command(script, flags, files)]
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}, timeout=60)
    assert_clear(done.returncode, done.stderr, words)


def test_there_are_enough_rows() -> None:
    assert len(ROWS) + len(CASES) >= 60 and {row[0] for row in ROWS} == set(MODULES)
    assert len({(row[0], row[1]) for row in ROWS}) == len(ROWS)


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, files: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["train_dpo.py", *command("dpo", "--beta 0 --debug", files)])
    with pytest.raises(Exception, match="--beta 0.0: must be above 0"):
        run_script(MODULES["dpo"].main, MODULES["dpo"].PRESETS, several=True)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only the superuser can become another user")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o755)
    process = os.fork()
    if not process:
        os.setuid(65_534)  # the superuser may write everywhere
        try:
            checkpoint.require_writable(tmp_path / "run")
        except Exception as error:
            os._exit(7 if "read-only for you; give another --run" in str(error) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 7
