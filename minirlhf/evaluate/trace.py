"""What the judge says of the policy while PPO trains, beside what the reward says: was the proxy optimised too far?

    python train_ppo.py --stage ppo-bold --beta 0.005 --learning-rate 1e-3 --trace-every 4
    python -m minirlhf.report runs/tiny                 # draws reward and judge against sqrt(KL), with a verdict

The prompts are the validation prompts of the embedded world: no stage trains on them, and the evaluation at the end
has others. Each measurement answers the same prompts with the same random numbers, so that two measurements can be
compared prompt by prompt. Nothing here flows back into training.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiktoken
from torch import Tensor

from minirlhf import data, distributed
from minirlhf.batch import Batch
from minirlhf.encode import encode_prompt
from minirlhf.model import GPT
from minirlhf.ops import kl_k1
from minirlhf.rollout import collect
from minirlhf.runtime import Stream, project_file
from minirlhf.tokenizer import response_text
from minirlhf.world import judge

FILE = "trace.jsonl"  # in the stage's folder
PROMPTS = 128


class Trace:
    """Measurements of one run of PPO, in `<stage>/trace.jsonl`.

    folder          of the stage
    every           iterations between two measurements; there is always one before the first and after the last
    iterations      of the stage
    reference       the frozen SFT model, for the KL
    reward          Batch -> (B,) scores: what PPO maximises
    seed, max_new_tokens, temperature, max_tokens  of the answers, and padded tokens a forward pass
    """

    def __init__(
        self,
        folder: Path,
        *,
        every: int,
        iterations: int,
        reference: GPT,
        reward: Callable[[Batch], Tensor],
        encoding: tiktoken.Encoding,
        seed: int,
        max_new_tokens: int,
        temperature: float,
        max_tokens: int,
    ) -> None:
        self.path, self.every, self.iterations = folder / FILE, every, iterations
        self.reference, self.reward, self.encoding = reference, reward, encoding
        self.seed, self.max_new_tokens, self.max_tokens = seed, max_new_tokens, max_tokens
        self.temperature = temperature
        records = data.load(project_file("world", "prompts.validation.jsonl"), "prompts")[:PROMPTS]
        self.prompts = [record["prompt"] for record in records]

    def observe(self, policy: GPT, iteration: int) -> None:
        """Measure if it is time. A run that goes on measures its first iteration again, with the same result."""
        if iteration % self.every == 0 or iteration == self.iterations:
            row = {"iteration": iteration, **self.measure(policy)}
            if distributed.is_writer():
                before = [line for line in read_trace(self.path) if line["iteration"] < iteration]
                lines = [json.dumps(line) + "\n" for line in (*before, row)]
                self.path.write_text("".join(lines), encoding="utf-8")

    def measure(self, policy: GPT) -> dict[str, Any]:
        """Means over the prompts, and `marks`, the judge's mark of each answer."""
        rollout = collect(
            policy,
            self.reference,
            None,
            self.reward,
            [encode_prompt(self.encoding, prompt) for prompt in self.prompts],
            keys=[(Stream.EVALUATION, i) for i in range(len(self.prompts))],
            seed=self.seed,
            eos_id=self.encoding.eot_token,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            missing_eos_score=None,
            rescore=False,
            max_tokens=self.max_tokens,
        )
        texts = [response_text(self.encoding, ids) for ids in rollout.response_ids()]
        verdicts = [judge(prompt, text) for prompt, text in zip(self.prompts, texts, strict=True)]
        means = {
            "kl": kl_k1(rollout.old_logprobs, rollout.ref_logprobs).sum(dim=1).mean().item(),
            "reward": rollout.scores.mean().item(),
            "judge": sum(v.total for v in verdicts) / len(verdicts),
            "helpful": sum(v.helpful for v in verdicts) / len(verdicts),
            "honest": sum(v.honest for v in verdicts) / len(verdicts),
            "harmless": sum(v.harmless for v in verdicts) / len(verdicts),
            "length": rollout.mask.sum(dim=1).float().mean().item(),
        }
        return {**means, "marks": [round(v.total, 6) for v in verdicts]}


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The measurements in a file, in order; none where there is no file."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines()]
