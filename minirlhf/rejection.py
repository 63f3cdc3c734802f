"""Rejection sampling: fine-tune on the best of several answers, by a reward model or a function.

    python -m minirlhf.rejection --candidates 8                  # writes <run>/rejection/best.jsonl and random.jsonl
    python train_sft.py --run runs/tiny/best --model runs/tiny/sft/model --train runs/tiny/rejection/best.jsonl \\
        --learning-rate 3e-4 --epochs 2

    python -m minirlhf.rejection --stage rejection-2 --policy runs/tiny/best/sft/model      # once more, from there

Each prompt is answered `--candidates` times, and the finished answer with the highest score wins; random.jsonl holds a
random finished answer of the same ones, the control for what fine-tuning on own samples does by itself. A prompt
without a finished answer is left out of both; a blank answer cannot be learned from, and counts as unfinished.
Dong et al. 2023 (RAFT), arXiv 2304.06767; Touvron et al. 2023 (Llama 2), arXiv 2307.09288, section 3.2.3.
The winners are texts like any other demonstrations: train_sft.py encodes them anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from minirlhf import reward_functions
from minirlhf.batch import over_micro_batches, permutation
from minirlhf.config import AtLeastTwo, Count, FolderName, SamplingConfig, run_script
from minirlhf.encode import Record
from minirlhf.evaluate.evaluation import best_of_n_kl
from minirlhf.files import source_hash, write_records
from minirlhf.generate import SLOTS, generate
from minirlhf.model import GPT
from minirlhf.runs.stage import Stage
from minirlhf.runtime import Stream, require, require_finite, resolve_device
from minirlhf.tokenizer import response_text


@dataclass
class Config(SamplingConfig):
    preset: Literal["tiny"] = "tiny"
    """Set of defaults."""
    stage: FolderName = "rejection"
    """Name of this stage's folder in the run; another name keeps an earlier result."""
    candidates: AtLeastTwo = 8
    """Answers to each prompt, of which one is chosen."""
    micro_batch_tokens: Count = 8192
    """Padded tokens per forward pass."""


PRESETS = {"tiny": Config()}


def best_of_n_mean(scores: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """The expected value of the best of n by score, without bias, from N >= n samples of each prompt.

    sum_i [C(i-1, n-1) / C(N, n)] value_(i),  value_(i) that of the i-th lowest score: the mean over all subsets of n

    Nakano et al. 2021 (WebGPT), appendix I; Gao et al. 2022. Equal scores win equally often: with L lower scores and E
    equal ones (itself included) a sample weighs [C(L+E, n) - C(L, n)] / (E C(N, n)), the formula above where E = 1.
    Shapes: `scores`, `values` (P, N) -> (P,). `values` are the scores themselves, or a judge's, to see what a proxy
    buys. Raises ValueError for other shapes or n outside 1..N. Trap: the best of the first n is unbiased too, but uses
    n of the N samples.
    """
    if scores.ndim != 2 or scores.shape != values.shape:
        raise ValueError(f"scores has shape {scores.shape} and values {values.shape}; pass (P, N) each")
    count = scores.shape[1]
    if not 1 <= n <= count:
        raise ValueError(f"n is {n}; it must lie between 1 and the {count} samples")
    share = np.array([math.comb(m, n) / math.comb(count, n) for m in range(count + 1)])  # all n among the m lowest
    lower = (scores[:, None, :] < scores[:, :, None]).sum(axis=2)  # (P, N)
    equal = (scores[:, None, :] == scores[:, :, None]).sum(axis=2)
    return ((share[lower + equal] - share[lower]) / equal * values).sum(axis=1)


def choose(scores: np.ndarray, finished: np.ndarray) -> np.ndarray:
    """(P,) the finished candidate with the highest score, the first of equal ones; -1 where none finished."""
    best = np.where(finished, scores, -np.inf).argmax(axis=1)
    return np.where(finished.any(axis=1), best, -1)


def choose_randomly(finished: np.ndarray, *, seed: int) -> np.ndarray:
    """(P,) a finished candidate, each as likely as another, whatever its score; -1 where none finished."""
    orders = [permutation(finished.shape[1], seed, Stream.REJECTION, i) for i in range(len(finished))]
    return choose(-np.argsort(orders, axis=1), finished)  # the first of its order


def main(config: Config) -> Path:
    """Run the stage; returns the file of the winners."""
    device = resolve_device(config.device)
    sources = reward_functions.find_sources(config)
    output = config.run / config.stage / "best.jsonl"
    stage = Stage(config, config.stage, inputs=sources.files, models=sources.models)
    if stage.finished:
        return output
    env = reward_functions.read_environment(config, sources)
    policy = GPT.from_pretrained(sources.policy).to(device).eval().requires_grad_(False)
    members = reward_functions.load_reward_models(sources, device)
    reward = reward_functions.reward_of(config, members, sources.functions, env.encoding)

    with stage.begin(None, steps=1):
        rows = [(i, k) for i in range(len(env.prompts)) for k in range(config.candidates)]
        samples = generate(
            policy,
            [env.prompts[i] for i, _ in rows],
            max_new_tokens=config.max_new_tokens,
            eos_id=env.encoding.eot_token,
            temperature=config.temperature,
            seed=config.seed,
            keys=[(Stream.REJECTION, i, k) for i, k in rows],
            slots=SLOTS,
        )
        given = over_micro_batches(reward, samples, config.micro_batch_tokens)
        require_finite(scores=given)
        scores, finished = (x.view(len(env.prompts), -1).cpu().numpy() for x in (given, samples.finished))
        answers = [response_text(env.encoding, row) for row in samples.response_ids()]
        finished &= np.array([bool(answer.strip()) for answer in answers]).reshape(finished.shape)
        choices = {"best": choose(scores, finished), "random": choose_randomly(finished, seed=config.seed)}
        origin = {"policy": source_hash(sources.policy), "seed": config.seed}
        for name, chosen in choices.items():
            records = winners(env.texts, answers, scores, chosen, origin | {"choice": name})
            write_records(config.run / config.stage / f"{name}.jsonl", records)
        stage.finish(0, statistics(scores, choices), tokens=int(samples.lengths.sum()))
    print(table(scores))
    return output


def winners(
    prompts: Sequence[str], answers: Sequence[str], scores: np.ndarray, chosen: np.ndarray, origin: Record
) -> list[Record]:
    """A demonstration for each prompt with a chosen answer: the answer, its score, its origin."""
    count = scores.shape[1]
    return [
        {"prompt": prompts[i], "response": answers[i * count + k], "score": float(scores[i, k]), **origin}
        for i, k in enumerate(chosen.tolist())
        if k >= 0
    ]


def statistics(scores: np.ndarray, choices: dict[str, np.ndarray]) -> dict[str, float]:
    """Counts, and the mean scores of all candidates and of each choice; raises UserError where no answer finished."""
    answered = choices["best"] >= 0
    require(bool(answered.any()), "no answer finished: raise --max-new-tokens")
    counts = {"prompts": int(answered.sum()), "prompts_without_a_finished_answer": int((~answered).sum())}
    means = {f"score_{name}": float(scores[answered, c[answered]].mean()) for name, c in choices.items()}
    return {**counts, "score": float(scores.mean()), **means}


def table(scores: np.ndarray) -> str:
    """Table of the score of the best of n, n = 1, 2, 4, ... up to the number of candidates, and the bound on its KL."""
    count = scores.shape[1]
    sizes = [2**power for power in range(count.bit_length()) if 2**power < count] + [count]
    rows = [(n, best_of_n_mean(scores, scores, n).mean(), best_of_n_kl(n)) for n in sizes]
    head = f"{'n':>4}{'score of the best of n':>24}{'KL at most (nats)':>20}"
    return "\n".join([head, *(f"{n:>4}{mean:>24.3f}{kl:>20.2f}" for n, mean, kl in rows)])


if __name__ == "__main__":
    run_script(main, PRESETS)
