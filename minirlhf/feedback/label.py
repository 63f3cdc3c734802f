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

from minirlhf.config import Fraction, Port
from minirlhf.feedback.label_file import LabelFile
from minirlhf.feedback.page import label_on_page
from minirlhf.feedback.session import Session
from minirlhf.feedback.tasks import Mode, TaskConfig, make_tasks
from minirlhf.feedback.terminal import label_in_terminal


@dataclass
class Config(TaskConfig):
    output: Path | None = None
    """File of labels, by default `<run>/labels/labels.jsonl`; an existing one is gone on with."""
    labeller: str = "person"
    """Your name in the labels; each name has an order and a progress of its own."""
    mode: Mode = "pairs"
    """`pairs` of answers, or `rankings` of all answers to a prompt."""
    repeats: Fraction = 0.1
    """Share of the items asked a second time, to measure self-agreement."""
    page: bool = False
    """Serve a page on 127.0.0.1 instead of asking in the terminal."""
    port: Port = 0
    """Port of the page; 0 takes a free one."""


def main(config: Config) -> Path:
    """Ask until all is done or the labeller stops; returns the file of labels."""
    output = config.output or config.run / "labels" / "labels.jsonl"
    tasks = make_tasks(config, config.labeller, mode=config.mode, repeat_share=config.repeats)
    with LabelFile(output) as file:
        session = Session(tasks, file, labeller=config.labeller)
        if config.page:
            label_on_page(session, port=config.port)
        else:
            label_in_terminal(session)
    return output
