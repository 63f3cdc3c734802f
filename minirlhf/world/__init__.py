"""The embedded world: a made-up zoo to talk about, a judge, writers of demonstrations and a simulated labeller.

It needs neither torch nor the rest of minirlhf. Training sees the demonstrations and the labeller's preferences;
the judge is for labelling and for evaluation.
"""

from minirlhf.world.judge import Judgement, judge
from minirlhf.world.labeller import TEMPERATURE, Labeller
from minirlhf.world.writers import SHARES, WRITERS, demonstrate, ideal
from minirlhf.world.zoo import KINDS, Question, find, questions

__all__ = [
    "KINDS",
    "SHARES",
    "TEMPERATURE",
    "WRITERS",
    "Judgement",
    "Labeller",
    "Question",
    "demonstrate",
    "find",
    "ideal",
    "judge",
    "questions",
]
