"""The simulated labeller: ranks responses as a person might, better ones first but not always.

Boltzmann-rational on the judge's total: a ranking is drawn from the Plackett-Luce model with utilities

    u_i = (total_i + length_bias * words_i) / temperature

so that of two responses the first is preferred with probability sigmoid(u_1 - u_2). Plackett (1975), Luce (1959).
Responses of equal worth draw the same noise and so tie: who sees no difference says so, instead of tossing a coin.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from minirlhf.world.judge import judge

Key = int | str | tuple["Key", ...]

TEMPERATURE = 0.1  # in units of the judge's total; about 97 of 100 labels then agree with the judge


@dataclass(frozen=True)
class Labeller:
    """Ranks responses by the judge's total, a little at random.

    temperature: 0 follows the judge exactly (equal totals tie); large is indifferent. Units of the total.
    noise: probability that a whole ranking is reversed, so that each pair is flipped with this probability.
    length_bias: added to the total for each word; positive prefers longer responses.
    seed: one labeller; another seed is another labeller with the same habits.
    """

    temperature: float = TEMPERATURE
    noise: float = 0.0
    length_bias: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be 0 or more and finite, not {self.temperature}")
        if not 0 <= self.noise <= 1:
            raise ValueError(f"noise is a probability between 0 and 1, not {self.noise}")

    def rank(self, prompt: str, responses: Sequence[str], key: Key) -> list[int]:
        """The rank of each response: 0 is best, equal texts have equal ranks, no rank is left out.

        The draws are keyed by (seed, key, worth), not by the order of calls or of responses. `key` says which
        ranking this is, for example (prompt index, round): an int, a str, or a tuple of them.
        """
        worth = {text: self._worth(prompt, text, key) for text in responses}
        levels = sorted(set(worth.values()), reverse=True)
        if self._stream("noise", key).random() < self.noise:
            levels.reverse()
        return [levels.index(worth[text]) for text in responses]

    def _worth(self, prompt: str, response: str, key: Key) -> float:
        worth = judge(prompt, response).total + self.length_bias * len(response.split())
        if self.temperature == 0:
            return worth
        # Sorting by utility plus Gumbel noise draws from Plackett-Luce.
        uniform = 1.0 - self._stream("worth", key, round(worth, 9)).random()  # (0, 1], so that the logarithm is finite
        gumbel = -math.log(max(-math.log(uniform), 1e-300))
        return worth / self.temperature + gumbel

    def _stream(self, *parts: object) -> random.Random:
        # ascii() keeps the parts apart, and escapes lone surrogates, which cannot seed a stream as they are.
        return random.Random(ascii((self.seed, *parts)))
