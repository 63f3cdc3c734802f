"""Label candidates by the simulated people of the embedded world, with noise and length bias as you set them.

python -m minirlhf.feedback label --by simulated --noise 0.1 --length-bias 0.02
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from minirlhf.config import Finite, Fraction, NotNegative
from minirlhf.feedback import machine
from minirlhf.feedback.machine import Opinion, label_by_machine
from minirlhf.feedback.tasks import Mode, Task
from minirlhf.runtime import UserError
from minirlhf.world import TEMPERATURE, Labeller


@dataclass
class Config(machine.Config):
    labeller: str = "simulated"
    """Name in the labels."""
    mode: Mode = "pairs"
    """`pairs` of answers, or `rankings` of all answers to a prompt."""
    temperature: NotNegative = TEMPERATURE
    """In units of the judge's score: 0 always prefers the better answer."""
    noise: Fraction = 0.0
    """Probability that a label is reversed."""
    length_bias: Finite = 0.0
    """What a word more adds to an answer's score in the labeller's eyes."""


PRESETS = {"simulated": Config()}


def main(config: Config) -> Path:
    """Label the candidates; returns the file."""
    people = Labeller(config.temperature, config.noise, config.length_bias, config.seed)
    return label_by_machine(config, config.mode, lambda tasks: opinions(people, tasks))


def opinions(people: Labeller, tasks: Sequence[Task]) -> Iterator[Opinion]:
    """What the simulated people say; raises UserError for a prompt that is not of the embedded world."""
    for task in tasks:
        try:
            ranks = people.rank(task.candidates.prompt, task.candidates.responses, key=task.key[0])
        except ValueError as error:
            raise UserError(f"--by simulated: {error}") from error
        yield Opinion(tuple(ranks))
