"""The work that the speed benchmarks do: shapes, batches of random tokens, and the FLOPs that this work needs.

Used by both sides of a comparison, so it imports neither this project nor any peer. A batch is a function of (stage,
size, number): both sides compute the same tokens in the same order. Token 0 is EOS; 1 and 2 are left to a peer's
padding and unknown word; contents are 3 to V - 1, uniform, because no timing here depends on what a token means.

FLOPs are those of the matrix products of useful work, 2 for each multiply-add: no padding, causal attention over the
keys that a query may read, the head at the positions that a loss reads, a prompt shared by several responses once. The
same number is divided by the time of either side, so it does not favour the one that does more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

EOS = 0
FIRST = 3  # lowest id of contents


@dataclass(frozen=True)
class Size:
    """A GPT-2's shape and what is computed with it.

    sft_rows, sft_length        rows an SFT step, tokens each
    pairs, shortest, longest    pairs a reward or DPO step; tokens of a prompt and of a response, uniform between both
    prompts, prompt_length, response_length, epochs, minibatches    of a PPO update; responses run to full length
    rows, new_tokens            of generation, from prompts of `prompt_length`
    batches                     different batches, which repeat; turn is the steps in a row that one side makes
    """

    layers: int
    heads: int
    width: int
    vocabulary: int
    context: int
    sft_rows: int = 4
    sft_length: int = 128
    pairs: int = 4
    shortest: int = 16
    longest: int = 64
    prompts: int = 8
    prompt_length: int = 32
    response_length: int = 32
    epochs: int = 4
    minibatches: int = 2
    rows: int = 32
    new_tokens: int = 64
    batches: int = 8
    turn: int = 1


_GPU = {
    **{"sft_rows": 32, "sft_length": 1024, "pairs": 64, "shortest": 32, "longest": 256},
    **{"prompts": 256, "prompt_length": 64, "response_length": 64, "minibatches": 4, "rows": 256, "new_tokens": 128},
}
_GPT2 = {
    "124M": {"layers": 12, "heads": 12, "width": 768, "vocabulary": 50257, "context": 1024},
    "355M": {"layers": 24, "heads": 16, "width": 1024, "vocabulary": 50257, "context": 1024},
    "1.5B": {"layers": 48, "heads": 25, "width": 1600, "vocabulary": 50257, "context": 1024},
}
_TINY = {"layers": 4, "heads": 4, "width": 128, "vocabulary": 2048, "context": 256}
_FEW = {"sft_rows": 2, "sft_length": 12, "pairs": 2, "shortest": 3, "longest": 6, "prompts": 4, "prompt_length": 4}
SIZES = {
    "4x128": Size(**_TINY, sft_rows=16, pairs=16, prompts=32, minibatches=4, batches=24, turn=3),
    "124M": Size(**_GPT2["124M"]),
    "smoke": Size(1, 2, 16, 64, 32, **_FEW, response_length=4, epochs=1, rows=3, new_tokens=4, batches=2),
}
GPU_SIZES = {name: Size(**shape, **_GPU, batches=16) for name, shape in _GPT2.items()}


def size_of(name: str, device: str) -> Size:
    """The size of that name; on a GPU the released GPT-2 shapes have larger batches."""
    return GPU_SIZES.get(name, SIZES.get(name)) if device == "cuda" else SIZES[name]


# ------------------------------------------------------------------------------------------------------------- batches
@dataclass(frozen=True)
class Pair:
    """Token ids of a prompt and two responses, each response ending with EOS."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def rows(size: Size, count: int, length: int) -> np.ndarray:
    """(count, length) random tokens, the same for every caller."""
    return np.random.default_rng(0).integers(FIRST, size.vocabulary, (count, length))


def sft_batches(size: Size) -> np.ndarray:
    """(batches, B, T) tokens; every one but a row's first is predicted."""
    return rows(size, size.batches * size.sft_rows, size.sft_length).reshape(size.batches, size.sft_rows, -1)


def pair_batches(size: Size) -> list[list[Pair]]:
    """Batches of pairs, lengths uniform from `shortest` to `longest`, both included."""
    generator = np.random.default_rng(0)

    def text() -> list[int]:
        length = generator.integers(size.shortest, size.longest + 1)
        return generator.integers(FIRST, size.vocabulary, length).tolist()

    def pair() -> Pair:
        prompt, chosen, rejected = text(), text(), text()
        return Pair(prompt, [*chosen[:-1], EOS], [*rejected[:-1], EOS])

    return [[pair() for _ in range(size.pairs)] for _ in range(size.batches)]


def prompt_batches(size: Size) -> np.ndarray:
    """(batches, prompts, prompt_length) tokens for PPO."""
    shape = (size.batches, size.prompts, size.prompt_length)
    return rows(size, shape[0] * shape[1], shape[2]).reshape(shape)


def generation_prompts(size: Size) -> np.ndarray:
    """(rows, prompt_length) tokens to generate from."""
    return rows(size, size.rows, size.prompt_length)


# --------------------------------------------------------------------------------------------------------------- FLOPs
def parameters(size: Size) -> int:
    """Weights of the model, its tied head counted once."""
    block = 12 * size.width**2 + 13 * size.width
    return (size.vocabulary + size.context) * size.width + size.layers * block + 2 * size.width


def trunk_flops(size: Size, tokens: float, attended: float) -> float:
    """One forward of the blocks over `tokens` inputs whose queries read `attended` keys in all."""
    return size.layers * (2 * 12 * size.width**2 * tokens + 4 * size.width * attended)


def head_flops(size: Size, positions: float) -> float:
    """The head's logits at that many positions."""
    return 2 * size.vocabulary * size.width * positions


def attended(prompt: int, responses: list[int]) -> int:
    """Keys that the queries of a prompt and of the responses that share it read: up to and with their own token."""
    return prompt * (prompt + 1) // 2 + sum(n * prompt + n * (n + 1) // 2 for n in responses)


def useful_flops(stage: str, size: Size) -> float:
    """FLOPs of one step of `sft`, `reward`, `dpo`, `ppo` or `generate`, the mean over its batches."""
    if stage == "sft":
        inputs = size.sft_length - 1  # nothing is predicted from the last token
        row = trunk_flops(size, inputs, attended(inputs, [])) + head_flops(size, inputs)
        return 3 * size.sft_rows * row  # forward 1, backward 2
    if stage in ("reward", "dpo"):
        return _pair_flops(size, dpo=stage == "dpo")
    length = size.prompt_length + (size.new_tokens if stage == "generate" else size.response_length)
    inputs = length - 1
    trunk = trunk_flops(size, inputs, attended(inputs, []))
    policy = trunk + head_flops(size, length - size.prompt_length)
    if stage == "generate":
        return size.rows * policy
    scored = policy + trunk + trunk_flops(size, length, attended(length, []))  # reference, value model, reward model
    return size.prompts * (policy + scored + 3 * size.epochs * (policy + trunk))


def _pair_flops(size: Size, *, dpo: bool) -> float:
    """Reward: forward and backward over all tokens. DPO: the same with the head, and the reference's forward."""
    total = 0.0
    for pair in (pair for batch in pair_batches(size) for pair in batch):
        responses = [len(pair.chosen) - dpo, len(pair.rejected) - dpo]  # DPO reads nothing at a last token
        prompt = len(pair.prompt)
        total += trunk_flops(size, prompt + sum(responses), attended(prompt, responses))
        total += dpo * head_flops(size, len(pair.chosen) + len(pair.rejected))
    return (4 if dpo else 3) * total / size.batches


def items(stage: str, size: Size) -> tuple[int, str]:
    """What a step gets done, and its unit."""
    return {
        "sft": (size.sft_rows * size.sft_length, "tokens"),
        "reward": (size.pairs, "pairs"),
        "dpo": (size.pairs, "pairs"),
        "ppo": (size.prompts, "responses"),
        "generate": (size.rows * size.new_tokens, "tokens"),
    }[stage]
