"""Final answers that can be checked: a reward without a model.

The worked example is a final answer that can be checked, as in ReFT (Luong et al. 2024, arXiv 2401.08967): `arithmetic`
works the expression in the prompt out, and `AnswerKey` looks the answer up in a file of gsm8k's form:

    # my_rewards.py
    from minirlhf.reward_functions import AnswerKey
    score = AnswerKey.read("gsm8k.train.jsonl.gz")        # --reward my_rewards:score --prompts gsm8k.train.jsonl.gz

Left out: partial credit for the way to the answer. The reward says what is wanted, not how to get there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction

from minirlhf import data
from minirlhf.runtime import UserError, require

FINAL = re.compile(r"####\s*\$?(-?\d[\d,]*(?:\.\d+)?)")


def final_answer(text: str) -> Fraction | None:
    """The number after the last `####`, as gsm8k marks it: commas and a dollar sign do not count; None without one.

    Exact, so that 3, 3.0 and 3.00 are one answer and 0.1 is not 0.10000001.
    """
    found = FINAL.findall(text)
    return Fraction(found[-1].replace(",", "")) if found else None


EXPRESSION = re.compile(r"-?\d+(?: *[-+*] *-?\d+)+")


def work_out(expression: str) -> Fraction:
    """The value of sums, differences and products of whole numbers, e.g. 3 + 4 * 5."""
    total, product = 0, 0
    for sign, number in re.findall(r"([-+*]?) *(-?\d+)", expression):
        if sign == "*":
            product *= int(number)
        else:
            total, product = total + product, -int(number) if sign == "-" else int(number)
    return Fraction(total + product)


def arithmetic(prompts: list[str], responses: list[str]) -> list[float]:
    """1 where the final answer after `####` is the value of the prompt's last expression, else 0.

    Raises UserError for a prompt without an expression such as 12 + 7 - 3.
    """
    scores = []
    for prompt, response in zip(prompts, responses, strict=True):
        found = EXPRESSION.findall(prompt)
        require(bool(found), f"no arithmetic in the prompt {prompt!r:.60}: this reward is for prompts like 12 + 7 - 3")
        scores.append(float(final_answer(response) == work_out(found[-1])))
    return scores


class AnswerKey:
    """Right or wrong by the final answers of known solutions: `key(prompts, responses)` -> 1 or 0 each.

    solutions  (prompt, worked answer) pairs; one without a final answer, or two that differ, is a UserError
    """

    def __init__(self, solutions: Iterable[tuple[str, str]]) -> None:
        self.answers: dict[str, Fraction] = {}
        for prompt, solution in solutions:
            answer = final_answer(solution)
            if answer is None:
                raise UserError(f"a solution without `#### answer`, of the prompt {prompt!r:.60}")
            same = self.answers.setdefault(prompt, answer) == answer
            require(same, f"two final answers to the prompt {prompt!r:.60}: {self.answers[prompt]} and {answer}")

    @classmethod
    def read(cls, source: str, *, split: str = "") -> AnswerKey:
        """From demonstrations, read as all stages read them, so that prompts are the same texts."""
        return cls((r["prompt"], r["response"]) for r in data.load(source, "demonstrations", split=split))

    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        strange = next((prompt for prompt in prompts if prompt not in self.answers), None)
        require(strange is None, f"no known answer to the prompt {strange!r:.60}; was it cut to fit the model?")
        pairs = zip(prompts, responses, strict=True)
        return [float(final_answer(response) == self.answers[prompt]) for prompt, response in pairs]
