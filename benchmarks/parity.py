"""The same numbers as a peer: losses and whitening of this package against an installed TRL, on random inputs.

    python benchmarks/parity.py --ppo-trl trl-1.12 > table.md

TRL is no dependency of this package. Make an environment of its own beside it, torch first, so that the CPU build is
taken, and the last TRL that has PPO (1.12.0; newer ones dropped it, and masked whitening with it) in a folder:

    python3.11 -m venv trl-env
    trl-env/bin/pip install torch==2.13.0
    trl-env/bin/pip install numpy transformers==5.23.0 trl==1.16.0 datasets==5.2.0 accelerate==1.15.0
    trl-env/bin/pip install --no-deps --target trl-1.12 trl==1.12.0
    PYTHONPATH=. trl-env/bin/python benchmarks/parity.py --ppo-trl trl-1.12

What runs is TRL's own code: the trainers' methods, on trainers made without their constructor and a model that returns
the numbers drawn here. Both sides see the same tensors; responses have unequal lengths. Values and gradients with
respect to the policy's log-probabilities (or the scores) are compared, and the largest absolute difference over all
seeds is printed. Where a convention differs, ours is converted to TRL's and the note says how.

Left out on purpose: PPO's policy and value losses and GAE. TRL writes them inside its training loop, where nothing can
be called.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from minirlhf import bradley_terry, dpo, ops

SEEDS = range(5)
PAIRS, WIDTH, PROMPT = 16, 24, 4  # pairs a batch, columns a row, tokens of the prompt in each row
BETA, SMOOTHING, LAM, SIMPO_BETA, SIMPO_GAMMA, CENTRING = 0.5, 0.1, 0.1, 2.0, 1.0, 0.01


@dataclass
class Batch:
    """`PAIRS` chosen rows, then as many rejected ones, right-padded."""

    logprobs: Tensor  # (2N, T-1) of the policy, 0 off the response
    ref_logprobs: Tensor  # (2N, T-1) of the reference
    completion_mask: Tensor  # (2N, T) of integers, 1 on the response
    scores: Tensor  # (2N,)
    margin: Tensor  # (N,)
    desirable: Tensor  # (2N,) bool, for losses of single responses

    @property
    def mask(self) -> Tensor:
        """(2N, T-1) bool, in the index of the log-probabilities."""
        return self.completion_mask[:, 1:].bool()

    @property
    def lengths(self) -> Tensor:
        return self.completion_mask.sum(1)

    def summed(self) -> list[Tensor]:
        """Chosen, rejected, and both of the reference: log-probabilities summed over the response, (N,) each."""
        return [*self.logprobs.sum(1).chunk(2), *self.ref_logprobs.sum(1).chunk(2)]

    def averaged(self) -> list[Tensor]:
        """The same, divided by the length of the response."""
        return [x / n for x, n in zip(self.summed(), [*self.lengths.chunk(2)] * 2, strict=True)]


Loss = Callable[[Batch], Tensor]


@dataclass
class Row:
    """One line of the table; differences are the largest over all seeds."""

    name: str
    ours: str
    theirs: str
    value64: float
    gradient64: float
    value32: float
    note: str


def draw(seed: int, dtype: torch.dtype) -> Batch:
    """Log-probabilities near those of a language model, the policy a little off the reference."""
    generator = torch.Generator().manual_seed(seed)
    rows = 2 * PAIRS

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.randint(1, WIDTH - PROMPT + 1, (rows, 1), generator=generator)
    columns = torch.arange(WIDTH)
    mask = ((columns >= PROMPT) & (columns < PROMPT + lengths)).long()
    reference = -normal(rows, WIDTH - 1).abs() - 0.1
    policy = torch.minimum(reference + 0.8 * normal(rows, WIDTH - 1), torch.tensor(-0.01))
    numbers = policy * mask[:, 1:], reference * mask[:, 1:], 2 * normal(rows), normal(PAIRS).abs()
    policy, reference, scores, margin = (x.to(dtype) for x in numbers)
    desirable = torch.rand(rows, generator=generator) < 0.5
    return Batch(policy.requires_grad_(), reference, mask, scores.requires_grad_(), margin, desirable)


def compare(ours: Loss, theirs: Loss) -> dict[str, float]:
    """The largest differences of a value, whatever its shape, and of the gradient of a weighted sum of it."""
    worst = {"value64": 0.0, "gradient64": 0.0, "value32": 0.0}
    for dtype, suffix in ((torch.float64, "64"), (torch.float32, "32")):
        for seed in SEEDS:
            results = []
            for function in (ours, theirs):
                batch = draw(seed, dtype)
                value = function(batch)
                # Weights, because the plain sum of whitened numbers is 0 whatever they are; a scalar has weight 1.
                weights = torch.arange(1, value.numel() + 1, dtype=dtype).view(value.shape) / value.numel()
                (value * weights).sum().backward()
                gradients = [x.grad for x in (batch.logprobs, batch.scores) if x.grad is not None]
                results.append((value.detach(), torch.cat([g.flatten() for g in gradients])))
            (value, gradient), (other_value, other_gradient) = results
            difference, gradient_difference = (value - other_value).abs().max(), (gradient - other_gradient).abs().max()
            if not (gradient.any() and torch.isfinite(difference + gradient_difference)):
                raise SystemExit("nothing was compared: a result is not finite, or its gradient is 0 everywhere")
            worst[f"value{suffix}"] = max(worst[f"value{suffix}"], difference.item())
            if suffix == "64":
                worst["gradient64"] = max(worst["gradient64"], gradient_difference.item())
    return worst


def row(names: str, ours: Loss, theirs: Loss, note: str = "") -> Row:
    return Row(*names.split(" | "), **compare(ours, theirs), note=note)


def without_constructor(trainer: type, **attributes: object) -> object:
    """A trainer that can compute its loss and do nothing else."""
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)
    instance = object.__new__(trainer)
    common = {"accelerator": accelerator, "_metrics": {"train": defaultdict(list)}, "_total_train_tokens": 0}
    for name, value in (common | {"_tp_size": 1, "aux_loss_enabled": False} | attributes).items():
        setattr(instance, name, value)
    return instance


class Model:
    """Stands for a language model with TRL's fused head: answers each call with the next of the given numbers."""

    training = True

    def __init__(self, *answers: Tensor) -> None:
        self.answers = list(answers)

    def __call__(self, **inputs: object) -> SimpleNamespace:
        answer = self.answers.pop(0)
        zeros = torch.zeros_like(answer)  # for the metrics, which are not compared
        return SimpleNamespace(log_probs=answer, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), logits=answer)


def trl_dpo(loss_type: str, label_smoothing: float = 0.0) -> Loss:
    return lambda batch: run_trl_dpo(batch, loss_type, label_smoothing)


def run_trl_dpo(batch: Batch, loss_type: str, label_smoothing: float) -> Tensor:
    """`DPOTrainer._compute_loss`, with the reference's log-probabilities precomputed."""
    from trl import DPOTrainer

    chosen, rejected = batch.ref_logprobs.sum(1).chunk(2)
    model = Model(batch.logprobs)
    trainer = without_constructor(
        DPOTrainer,
        model=model,
        beta=BETA,
        loss_types=[loss_type],
        loss_weights=[1.0],
        label_smoothing=label_smoothing,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        precompute_ref_logps=True,
        use_weighting=False,
    )
    inputs = {
        "input_ids": torch.zeros_like(batch.completion_mask),
        "attention_mask": torch.ones_like(batch.completion_mask),
        "completion_mask": batch.completion_mask,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    return trainer._compute_loss(model, inputs, return_outputs=False)


def trl_smoothed(batch: Batch) -> Tensor:
    """TRL's AOT sorts the log-ratios over the batch before it smooths; over one pair that is cDPO."""
    losses = []
    for n in range(PAIRS):
        rows = torch.tensor([n, n + PAIRS])
        pair = [x[rows] for x in (batch.logprobs, batch.ref_logprobs, batch.completion_mask, batch.scores)]
        losses.append(run_trl_dpo(Batch(*pair, batch.margin[n : n + 1], batch.desirable[rows]), "aot", SMOOTHING))
    return torch.stack(losses).mean()


def trl_reward(batch: Batch, centring: float | None = None) -> Tensor:
    """`RewardTrainer.compute_loss`, with a margin."""
    from trl import RewardTrainer

    arguments = SimpleNamespace(center_rewards_coefficient=centring)
    model = Model(batch.scores[:, None])
    trainer = without_constructor(RewardTrainer, model=model, args=arguments)
    inputs = {"attention_mask": torch.ones_like(batch.completion_mask), "margin": batch.margin}
    return trainer.compute_loss(model, inputs)


def our_reward(batch: Batch, centring: float = 0.0) -> Tensor:
    chosen, rejected = batch.scores.chunk(2)
    loss = bradley_terry.bradley_terry_loss(chosen, rejected, margin=batch.margin)
    return loss + centring * bradley_terry.centring_loss(chosen, rejected)


def mismatched(x: Tensor) -> Tensor:
    """Stands for the log-probabilities of another prompt's responses; above the reference, so that z_0 is not 0."""
    return 0.5 * x.detach().roll(1, dims=0)


def trl_kto(batch: Batch) -> Tensor:
    """`KTOTrainer._compute_loss`: per-response losses, of which it takes the mean over the batch."""
    from trl import KTOTrainer

    model = Model(mismatched(batch.logprobs), batch.logprobs)
    trainer = without_constructor(
        KTOTrainer,
        model=model,
        beta=BETA,
        loss_type="kto",
        calculate_KL=True,
        precompute_ref_logps=True,
        desirable_weight=1.5,
        undesirable_weight=1.0,
    )
    ids, ones = torch.zeros_like(batch.completion_mask), torch.ones_like(batch.completion_mask)
    inputs = {"input_ids": ids, "attention_mask": ones, "completion_mask": batch.completion_mask}
    inputs |= {f"KL_{name}": value for name, value in inputs.items()}
    ref = batch.ref_logprobs.sum(1)
    inputs |= {"label": batch.desirable, "ref_logps": ref, "ref_KL_logps": ref.roll(1)}
    return trainer._compute_loss(model, inputs, return_outputs=False)


def our_kto(batch: Batch) -> Tensor:
    ref = batch.ref_logprobs.sum(1)
    z_0 = dpo.kto_reference_point(mismatched(batch.logprobs).sum(1), ref.roll(1))
    return dpo.kto_loss(
        batch.logprobs.sum(1), ref, batch.desirable, z_0, beta=BETA, desirable_weight=1.5, undesirable_weight=1.0
    )


def trl_orpo(batch: Batch) -> Tensor:
    """The odds-ratio term alone: `ORPOTrainer` takes its fine-tuning term from the logits of prompt and response."""
    from trl.experimental.orpo import ORPOTrainer

    trainer = without_constructor(ORPOTrainer, beta=LAM)
    return -trainer.odds_ratio_loss(*batch.averaged()[:2])[0].mean()


def our_orpo(batch: Batch) -> Tensor:
    loss = dpo.orpo_loss(*batch.summed()[:2], *batch.lengths.chunk(2), lam=LAM)
    return loss + batch.averaged()[0].mean()  # without the fine-tuning term, -mean l_chosen


def trl_simpo(batch: Batch) -> Tensor:
    from trl.experimental.cpo import CPOTrainer

    settings = {"beta": SIMPO_BETA, "simpo_gamma": SIMPO_GAMMA, "loss_type": "simpo", "label_smoothing": 0.0}
    trainer = without_constructor(CPOTrainer, alpha=0.0, **settings)
    return trainer.cpo_loss(*batch.averaged()[:2])[0].mean()


def our_simpo(batch: Batch) -> Tensor:
    return dpo.simpo_loss(*batch.summed()[:2], *batch.lengths.chunk(2), beta=SIMPO_BETA, gamma=SIMPO_GAMMA)


def pairwise(loss: Callable[..., Tensor], **coefficients: float) -> Loss:
    """One of our losses as a function of a batch, on log-probabilities summed over the response."""
    return lambda batch: loss(*batch.summed(), **coefficients)


def preference_rows() -> list[Row]:
    """All that the newer TRL has."""

    def averaged_ipo(batch: Batch) -> Tensor:
        return dpo.ipo_loss(*batch.averaged(), beta=BETA)

    plain = compare(pairwise(dpo.ipo_loss, beta=BETA), trl_dpo("ipo"))["value64"]
    sorting = (
        "This TRL's `sigmoid` has no label smoothing. Its `aot` has, after sorting log-ratios over the batch; one pair "
        "at a time, as here, there is nothing to sort."
    )
    averaging = (
        f"Converted: TRL averages log-ratios over the response, ours sums. Unconverted they differ by {plain:.2g}."
    )
    tuning = (
        "TRL computes in float32. Without the fine-tuning term: TRL's is the mean over all tokens of prompts and "
        "responses, ours the mean over responses of their own means."
    )
    smoothed = pairwise(dpo.dpo_loss, beta=BETA, label_smoothing=SMOOTHING)
    robust = pairwise(dpo.robust_dpo_loss, beta=BETA, label_smoothing=SMOOTHING)
    method = "DPOTrainer._compute_loss"
    return [
        row(f"DPO | dpo.dpo_loss | {method}, `sigmoid`", pairwise(dpo.dpo_loss, beta=BETA), trl_dpo("sigmoid")),
        row(f"cDPO | dpo.dpo_loss | {method}, `aot`", smoothed, trl_smoothed, sorting),
        row(f"robust DPO | dpo.robust_dpo_loss | {method}, `robust`", robust, trl_dpo("robust", SMOOTHING)),
        row(f"IPO | dpo.ipo_loss | {method}, `ipo`", averaged_ipo, trl_dpo("ipo"), averaging),
        row(f"hinge | dpo.hinge_loss | {method}, `hinge`", pairwise(dpo.hinge_loss, beta=BETA), trl_dpo("hinge")),
        row("KTO | dpo.kto_loss | KTOTrainer._compute_loss, `kto`", our_kto, trl_kto),
        row("ORPO | dpo.orpo_loss | ORPOTrainer.odds_ratio_loss", our_orpo, trl_orpo, tuning),
        row("SimPO | dpo.simpo_loss | CPOTrainer.cpo_loss, `simpo`", our_simpo, trl_simpo, "TRL takes averages."),
        row("reward, margin | bradley_terry.bradley_terry_loss | RewardTrainer.compute_loss", our_reward, trl_reward),
        row(
            "margin and centring | bradley_terry.centring_loss | RewardTrainer.compute_loss",
            lambda batch: our_reward(batch, CENTRING),
            lambda batch: trl_reward(batch, CENTRING),
        ),
    ]


def unbiased(batch: Batch, whitened: Tensor) -> Tensor:
    """Ours with the variance divided by the count less one, as TRL does."""
    x, mask = batch.logprobs, batch.mask
    count = mask.sum()
    variance = ops.masked_mean((x - ops.masked_mean(x, mask)).square(), mask)
    return whitened * ((variance + ops.VARIANCE_EPS) / (variance * count / (count - 1) + ops.VARIANCE_EPS)).sqrt()


def whitening_rows() -> list[Row]:
    """What only the older TRL has."""
    from trl.experimental.ppo.ppo_trainer import masked_whiten

    def shifted(batch: Batch) -> Tensor:
        return masked_whiten(batch.logprobs, batch.mask)[batch.mask]

    def unshifted(batch: Batch) -> Tensor:
        return masked_whiten(batch.logprobs, batch.mask, shift_mean=False)[batch.mask]

    def raw(batch: Batch) -> Tensor:
        return ops.whiten(batch.logprobs, batch.mask)[batch.mask]

    def whitened(batch: Batch) -> Tensor:
        return unbiased(batch, ops.whiten(batch.logprobs, batch.mask))[batch.mask]

    def rescaled(batch: Batch) -> Tensor:
        mean = ops.masked_mean(batch.logprobs, batch.mask)
        return (unbiased(batch, ops.rescale(batch.logprobs, batch.mask) - mean) + mean)[batch.mask]

    plain = compare(raw, shifted)["value64"]
    note = (
        f"Converted: TRL divides the variance by the count less one. Unconverted they differ by {plain:.2g}. TRL's "
        "factor is a quotient of two integer tensors, so float32: hence the 1e-7. Compared on the mask; off it ours is "
        "0, TRL's is not, and a nan there makes all of its result nan."
    )
    method = "masked_whiten (TRL 1.12)"
    return [
        row(f"whitening | ops.whiten | {method}", whitened, shifted, note),
        row(f"rescaling | ops.rescale | {method}, `shift_mean=False`", rescaled, unshifted, "As above."),
    ]


def older_rows(folder: Path) -> list[Row]:
    """`whitening_rows` in a process of its own, where the older TRL comes first on the path."""
    path = os.pathsep.join([str(folder.resolve()), *filter(None, sys.path)])
    command = [sys.executable, __file__, "--only-whitening"]
    answer = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise SystemExit(f"TRL in {folder} could not be compared; it must be trl==1.12.0:\n{answer.stderr}")
    return [Row(**row) for row in json.loads(answer.stdout)]


def table(rows: list[Row]) -> str:
    """Markdown; differences in float64, of value and gradient, and in float32."""
    lines = [
        "| function | ours | TRL's | value, float64 | gradient, float64 | value, float32 | note |",
        "|---|---|---|---:|---:|---:|---|",
    ]
    for row in rows:
        numbers = " | ".join(f"{x:.1e}" for x in (row.value64, row.gradient64, row.value32))
        lines.append(f"| {row.name} | `{row.ours}` | {row.theirs} | {numbers} | {row.note} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ppo-trl", type=Path, help="folder with trl 1.12.0, for masked whitening; else left out")
    parser.add_argument("--only-whitening", action="store_true", help="print its rows as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.only_whitening:
        print(json.dumps([asdict(row) for row in whitening_rows()]))
        return
    rows = preference_rows() + (older_rows(arguments.ppo_trl) if arguments.ppo_trl else [])
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "trl", "transformers")]
    print(
        f"Python {platform.python_version()}, {', '.join(versions)}; seeds {SEEDS.start} to {SEEDS.stop - 1}, ", end=""
    )
    print(f"{PAIRS} pairs, responses of 1 to {WIDTH - PROMPT} tokens\n")
    print(table(rows))


if __name__ == "__main__":
    main()
