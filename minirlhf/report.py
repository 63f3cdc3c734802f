"""A run as a picture: the curves of every stage on one sheet."""

from __future__ import annotations

from pathlib import Path

from minirlhf.metrics import read_rows

# stage, metric, what the panel is called; panels of stages that have not run are left out.
PANELS = (
    ("sft", "loss", "SFT: loss (nats a token)"),
    ("sft", "validation_loss", "SFT: held-out loss (nats a token)"),
    ("reward", "loss", "Reward model: loss"),
    ("reward", "accuracy", "Reward model: accuracy on the batch"),
    ("ppo", "score", "PPO: score (deviations of SFT answers)"),
    ("ppo", "kl", "PPO: KL to SFT (nats an answer)"),
    ("ppo", "response_length", "PPO: response length (tokens)"),
    ("ppo", "explained_variance", "PPO: explained variance"),
    ("dpo", "loss", "DPO: loss"),
    ("dpo", "validation_accuracy", "DPO: held-out accuracy"),
    ("dpo", "reward_chosen", "DPO: implicit reward, chosen"),
    ("dpo", "reward_rejected", "DPO: implicit reward, rejected"),
)


def plot_curves(run: Path) -> Path:
    """Draw the panels of the run's stages into `<run>/curves.png`; returns that path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    stages = {stage for stage, _, _ in PANELS if (run / stage / "metrics.jsonl").is_file()}
    rows = {stage: read_rows(run / stage) for stage in stages}
    panels = [panel for panel in PANELS if panel[0] in stages]
    columns = 4
    figure, axes = plt.subplots(-(-len(panels) // columns), columns, figsize=(16, 9), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (stage, metric, title) in zip(axes.flat, panels, strict=False):
        points = [(row["step"], row[metric]) for row in rows[stage] if metric in row]
        axis.plot(*zip(*points, strict=True))
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("iteration" if stage == "ppo" else "step", fontsize=8)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(run / "curves.png", dpi=80)
    plt.close(figure)
    return run / "curves.png"
