"""Label candidates by hand, in the terminal or on a page in the browser.

    python -m minirlhf.feedback label                  # in the terminal, a key a label
    python -m minirlhf.feedback label --page           # prints the address of a page on this machine
    python -m minirlhf.feedback label --mode rankings  # order all answers to a prompt, best first
    python -m minirlhf.feedback label --by NAME        # by machine: simulated, reward-model, judge-model, endpoint

Every label is on the disk before the next question appears: stop whenever you like, and start again to go on. Which
answer is on the left is drawn at random and kept with the label. One item in ten is asked a second time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minirlhf.config import Count, Fraction, Port, Seed, Settings
from minirlhf.feedback.candidates import read_candidates
from minirlhf.feedback.label_file import LabelFile
from minirlhf.feedback.page import label_on_page
from minirlhf.feedback.session import Session
from minirlhf.feedback.tasks import Mode, make_tasks
from minirlhf.feedback.terminal import label_in_terminal
from minirlhf.runtime import require


@dataclass
class Config(Settings):
    run: Path = Path("runs/tiny")
    """Folder of the run; reads and writes `<run>/labels`."""
    candidates: Path | None = None
    """What to label: candidates, or the simulated labeller's rankings; by default `<run>/labels/candidates.jsonl`."""
    output: Path | None = None
    """File of labels, by default `<run>/labels/labels.jsonl`; an existing one is gone on with."""
    labeller: str = "person"
    """Your name in the labels; each name has an order and a progress of its own."""
    mode: Mode = "pairs"
    """`pairs` of answers, or `rankings` of all answers to a prompt."""
    pairs_per_prompt: Count = 1
    """Pairs asked about each prompt. More prompts teach more than more pairs of one."""
    repeats: Fraction = 0.1
    """Share of the items asked a second time, to measure self-agreement."""
    page: bool = False
    """Serve a page on 127.0.0.1 instead of asking in the terminal."""
    port: Port = 0
    """Port of the page; 0 takes a free one."""
    seed: Seed = 0
    """Seed of the order of tasks and answers."""


PRESETS = {"label": Config()}


def main(config: Config) -> Path:
    """Ask until all is done or the labeller stops; returns the file of labels."""
    require(bool(config.labeller.strip()), "--labeller: give a name")
    require(0 <= config.repeats <= 1, f"--repeats {config.repeats}: must be a share between 0 and 1")
    require(config.pairs_per_prompt >= 1, f"--pairs-per-prompt {config.pairs_per_prompt}: must be at least 1")
    source = config.candidates or config.run / "labels" / "candidates.jsonl"
    output = config.output or config.run / "labels" / "labels.jsonl"
    require(source.is_file(), f"{source}: no such file; make it with `python -m minirlhf.feedback collect`")
    tasks = make_tasks(
        read_candidates(source),
        mode=config.mode,
        pairs_per_prompt=config.pairs_per_prompt,
        repeat_share=config.repeats,
        labeller=config.labeller,
        seed=config.seed,
    )
    with LabelFile(output) as file:
        session = Session(tasks, file, labeller=config.labeller)
        if config.page:
            label_on_page(session, port=config.port)
        else:
            label_in_terminal(session)
    return output
