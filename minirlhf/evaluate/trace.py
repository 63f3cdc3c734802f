"""What the judge says of the policy while PPO trains, beside what the reward says: was the proxy optimised too far?

    python train_ppo.py --stage ppo-bold --beta 0.005 --learning-rate 1e-3 --trace-every 4
    python -m minirlhf.report runs/tiny                 # draws reward and judge against sqrt(KL), with a verdict

The prompts are the validation prompts of the embedded world: no stage trains on them, and the evaluation at the end
has others. Each measurement answers the same prompts with the same random numbers, so that two measurements can be
compared prompt by prompt. Nothing here flows back into training.
"""

from __future__ import annotations

from typing import Any

import tiktoken

from minirlhf import data, distributed
from minirlhf.encode import encode_prompt
from minirlhf.evaluate.judges import world_marks
from minirlhf.files import read_records, write_records
from minirlhf.model import GPT
from minirlhf.ops import kl_k1
from minirlhf.reward_functions import Reward
from minirlhf.rollout import collect
from minirlhf.runtime import Stream, project_file
from minirlhf.tokenizer import response_text

FILE = "trace.jsonl"  # in the stage's folder
PROMPTS = 128
MAX_TOKENS = 2048  # padded, a forward pass


class Trace:
    """Measurements of one run of PPO, in `<run>/<stage>/trace.jsonl`.

    config  of the run: every `trace_every` iterations there is one, always one before the first and after the last
    Called with the state, the frozen SFT model (for the KL), the reward (what PPO maximises) and the encoding.
    """

    def __init__(self, config: Any) -> None:
        self.path, self.config = config.run / config.stage / FILE, config
        records = data.load(project_file("world", "prompts.validation.jsonl"), "prompts")[:PROMPTS]
        self.prompts = [record["prompt"] for record in records]

    def __call__(self, state: Any, reference: GPT, reward: Reward, encoding: tiktoken.Encoding) -> None:
        """Measure if it is time. A run that goes on measures its first iteration again, with the same result."""
        iteration = state.iteration
        if iteration % self.config.trace_every == 0 or iteration == self.config.iterations:
            row = {"iteration": iteration, **self.measure(state.policy, reference, reward, encoding)}
            if distributed.is_writer():
                before = [line for line in read_records(self.path) if line["iteration"] < iteration]
                write_records(self.path, [*before, row])

    def measure(self, policy: GPT, reference: GPT, reward: Reward, encoding: tiktoken.Encoding) -> dict[str, Any]:
        """Means over the prompts, and `marks`, the judge's mark of each answer."""
        rollout = collect(
            policy,
            reference,
            None,
            reward,
            [encode_prompt(encoding, prompt) for prompt in self.prompts],
            keys=[(Stream.EVALUATION, i) for i in range(len(self.prompts))],
            seed=self.config.seed,
            eos_id=encoding.eot_token,
            max_new_tokens=self.config.max_new_tokens,
            temperature=self.config.temperature,
            missing_eos_score=None,
            rescore=False,
            max_tokens=MAX_TOKENS,
        )
        texts = [response_text(encoding, ids) for ids in rollout.response_ids()]
        marks = {part: values.tolist() for part, values in world_marks(self.prompts, texts).items()}
        marks = {"judge": marks.pop("total"), **marks}
        return {
            "kl": kl_k1(rollout.old_logprobs, rollout.ref_logprobs).sum(dim=1).mean().item(),
            "reward": rollout.scores.mean().item(),
            **{name: sum(values) / len(values) for name, values in marks.items()},
            "length": rollout.mask.sum(dim=1).float().mean().item(),
            "marks": [round(mark, 6) for mark in marks["judge"]],
        }
