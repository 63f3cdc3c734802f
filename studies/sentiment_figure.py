"""The frontier of a judge against the KL to the SFT model, as a figure and as a table; a row a model."""

from __future__ import annotations

from pathlib import Path


def plot(rows: list[dict], path: Path) -> None:
    """The frontier: the judge against the KL, one line a method."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.2))
    names = {"ppo": "PPO", "dpo": "DPO", "dpo2": "DPO, second round", "best-of-n": "best-of-n (bound of the KL)"}
    for (method, line), mark in zip(names.items(), ("o-", "s-", "D-", "^--"), strict=True):
        mine = sorted((row for row in rows if row["method"] in (method, "sft")), key=lambda row: row["kl"])
        axes.plot([row["kl"] for row in mine], [row["judge"] for row in mine], mark, label=line)
        for row in mine:
            name = f"n={row['n']}" if row["n"] else f"{row['beta']}"
            axes.annotate(name, (row["kl"], row["judge"]), xytext=(4, -9), textcoords="offset points", fontsize=7)
    axes.axhline(rows[0]["judge"] + 0.4, color="grey", linewidth=0.8, linestyle=":", label="SFT + 0.4")
    axes.set_xlabel("KL to the SFT model, nats a continuation")
    axes.set_ylabel("judge: mean VADER compound")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def table(rows: list[dict]) -> str:
    """The figures as Markdown, with one continuation of each model."""
    lines = ["| model | KL | judge | 95 % interval | above SFT | 95 % interval | scorer | reward | length | distinct |"]
    lines.append("| --- " * 10 + "|")
    for row in rows:
        bound = "<= " if row["n"] else ""
        lines.append(
            f"| {label(row)} | {bound}{row['kl']:.1f} | {row['judge']:.2f} | {row['low']:.2f} to {row['high']:.2f} "
            f"| {row['gain']:+.2f} | {row['gain_low']:+.2f} to {row['gain_high']:+.2f} | {row['scorer']:+.2f} "
            f"| {row['reward']:+.2f} | {row['length']:.1f} | {row['distinct']:.2f} |"
        )
    return "\n".join([*lines, "", *(f"- {label(row)}: `{row['answer']}`" for row in rows)])


def label(row: dict) -> str:
    """A row's name: its method with beta or n."""
    setting = f", beta {row['beta']}" if row["beta"] else f", n {row['n']}" if row["n"] else ""
    return row["method"] + setting
