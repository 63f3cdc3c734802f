"""What the study of the frontier writes: CSV rows, the figure, and which method leads at which KL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Done = Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]  # settings and figures of each finished trial

FIELDS = ("method", "strength", "seed", "kl", "judge", "low", "high", "helpful", "honest", "harmless")
FIELDS += ("reward", "length")
MEANS = FIELDS[7:]
SFT = ("best-of-n", "1")
LEVELS = (0.25, 0.5, 1.0, 2.0, 4.0)  # nats
DRAWS = 1000
MARKS = dict(
    zip(("PPO", "RLOO", "GRPO", "DPO", "online DPO", "best-of-n", "rejection sampling"), "osDv^xP", strict=True)
)


@dataclass(frozen=True)
class Place:
    """A method at one strength: of S seeds and P prompts the judge (S, P), the KL (S, P) or known (S, 1), and means."""

    seeds: tuple[int, ...]
    kl: np.ndarray
    gold: np.ndarray
    means: Mapping[str, np.ndarray]  # (S,)


def places(done: Done) -> dict[tuple[str, str], Place]:
    """By (method, strength), the SFT model under `SFT`."""
    found: dict[tuple[str, str], list[tuple[int, Mapping[str, Any]]]] = {}
    for settings, figures in done:
        for point in figures["points"]:
            found.setdefault((settings["method"], point["strength"]), []).append((settings["seed"], point))
    return {
        key: Place(
            tuple(seed for seed, _ in points),
            np.array([point["kl"] for _, point in points]),
            np.array([point["gold"] for _, point in points]),
            {name: np.array([point[name] for _, point in points]) for name in MEANS},
        )
        for key, points in found.items()
    }


class Draws:
    """Bootstrap over seeds and prompts at once: the same draws for every method, so that differences are paired.

    `mean(values)` of (S, P) or (S, 1) -> (DRAWS + 1, S) means over the drawn prompts of the drawn seeds, the first
    over all of both. Trap: with three seeds there are ten draws of seeds, so the intervals are on the narrow side.
    """

    def __init__(self, seeds: int, prompts: int) -> None:
        random = np.random.default_rng(0)
        chosen = random.integers(seeds, size=(DRAWS, seeds))
        self.seeds = np.concatenate([np.arange(seeds)[None], chosen])
        counts = random.multinomial(prompts, np.full(prompts, 1 / prompts), size=DRAWS)
        self.weights = np.concatenate([np.ones((1, prompts)), counts]) / prompts  # (DRAWS + 1, P)

    def mean(self, values: np.ndarray) -> np.ndarray:
        weights = self.weights if values.shape[1] > 1 else np.ones((len(self.weights), 1))
        return np.take_along_axis(weights @ values.T, self.seeds, axis=1)


def interval(drawn: np.ndarray) -> tuple[float, float, float]:
    """Estimate and 95 % interval of (DRAWS + 1,) values, of which the first is the estimate."""
    low, high = np.percentile(drawn[1:], (2.5, 97.5))
    return float(drawn[0]), float(low), float(high)


def text(drawn: np.ndarray, sign: str = "") -> str:
    """An estimate with its interval."""
    value, low, high = (f"{x:{sign}.2f}" for x in interval(drawn))
    return f"{value} ({low} to {high})"


def whole(known: Mapping[tuple[str, str], Place]) -> dict[tuple[str, str], Place]:
    """Those that have all seeds: an unfinished study compares nothing else."""
    most = max(len(place.seeds) for place in known.values())
    return {key: place for key, place in known.items() if len(place.seeds) == most}


def draws_of(known: Mapping[tuple[str, str], Place]) -> Draws:
    """The draws for all places, which share seeds and prompts."""
    return Draws(*next(iter(known.values())).gold.shape)


def curves(known: Mapping[tuple[str, str], Place], draws: Draws) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of each method, from the SFT model on: (K, DRAWS + 1, S) distances sqrt(KL), and the judge."""
    found = {}
    for method in dict.fromkeys(method for method, _ in known):
        mine = [place for (name, _), place in known.items() if name == method]
        mine = mine if method == SFT[0] else [known[SFT], *mine]
        kl = np.stack([np.maximum(draws.mean(place.kl), 0.0) for place in mine])
        found[method] = np.sqrt(kl), np.stack([draws.mean(place.gold) for place in mine])
    return found


def at(level: float, curve: tuple[np.ndarray, np.ndarray]) -> np.ndarray | None:
    """(DRAWS + 1,) the judge at a KL, linear in its root between measured points; None where a seed stays below."""
    d, gold = curve
    distance = np.sqrt(level)
    if (d[:, 0].max(axis=0) < distance).any():
        return None
    found = np.empty(d.shape[1:])
    for draw, seed in np.ndindex(found.shape):
        order = d[:, draw, seed].argsort()
        found[draw, seed] = np.interp(distance, d[order, draw, seed], gold[order, draw, seed])
    return found.mean(axis=1)


def rows_of(done: Done) -> Iterator[dict[str, Any]]:
    """A row a method, strength and seed, and one for all seeds together with its interval over seeds and prompts."""
    for (method, strength), place in places(done).items():
        name = {"method": "SFT", "strength": ""} if (method, strength) == SFT else {}
        for seed in (*range(len(place.seeds)), None):
            some = slice(None) if seed is None else slice(seed, seed + 1)
            gold, kl = place.gold[some], place.kl[some]
            judge, low, high = interval(Draws(*gold.shape).mean(gold).mean(axis=1))
            numbers = {"kl": kl.mean(), "judge": judge, "low": low, "high": high}
            numbers |= {key: values[some].mean() for key, values in place.means.items()}
            label = "all" if seed is None else place.seeds[seed]
            rounded = {key: round(float(value), 4) for key, value in numbers.items()}
            yield {"method": method, "strength": strength, **name, "seed": label, **rounded}


def plot(done: Done, path: Path) -> None:
    """The judge against the KL, a line a method, with intervals over seeds and prompts; the KL's axis by its root."""
    from matplotlib import pyplot

    known = whole(places(done))
    draws = draws_of(known)
    figure, axes = pyplot.subplots(figsize=(8.4, 5.4))
    for method, (d, gold) in curves(known, draws).items():
        kl = (d[:, 0] ** 2).mean(axis=1)
        order = kl.argsort()
        ends = np.array([interval(values.mean(axis=1)) for values in gold])[order]
        bars = np.abs(ends[:, 1:] - ends[:, :1]).T
        label = method + (" (bound of the KL)" if method == SFT[0] else "")
        axes.errorbar(kl[order], ends[:, 0], bars, marker=MARKS[method], linewidth=1, capsize=2, label=label)
    axes.set_xscale("function", functions=(np.sqrt, np.square))
    furthest = max(place.kl.mean() for place in known.values())
    axes.set_xticks([tick for tick in (0, 0.1, 0.5, 1, 2, 4, 8, 16, 32) if tick <= furthest])
    axes.set_xlim(0, 1.1 * furthest)
    axes.set_xlabel("KL to the SFT model (nats an answer)")
    axes.set_ylabel("judge, mean over held-out prompts")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def report(done: Done) -> str:
    """Three tables: every method and strength; who leads at which KL; RLOO and GRPO less PPO at each beta."""
    known = whole(places(done))
    draws = draws_of(known)
    return "\n\n".join([table(known, draws), leaders(known, draws), differences(known, draws)])


def table(known: Mapping[tuple[str, str], Place], draws: Draws) -> str:
    """A row a method and strength, means over the seeds."""
    lines = [
        "| method | beta, n, round | KL | judge | helpful | honest | harmless | reward | length |",
        "| --- " * 9 + "|",
    ]
    for key, place in known.items():
        method, strength = ("SFT", "") if key == SFT else key
        bound = "at most " if method == SFT[0] else ""
        kl = f"{bound}{place.kl.mean():.2f}" if place.kl.shape[1] == 1 else text(draws.mean(place.kl).mean(axis=1))
        means = " | ".join(f"{place.means[name].mean():.2f}" for name in MEANS)
        lines.append(f"| {method} | {strength} | {kl} | {text(draws.mean(place.gold).mean(axis=1))} | {means} |")
    return "\n".join(lines)


def leaders(known: Mapping[tuple[str, str], Place], draws: Draws) -> str:
    """The judge of each method at a few KLs, and by how much the first is ahead of the second."""
    drawn = curves(known, draws)
    lines = [f"| KL | {' | '.join(drawn)} | leads | ahead of the second by |", "| --- " * (len(drawn) + 3) + "|"]
    for level in LEVELS:
        found = {method: at(level, curve) for method, curve in drawn.items()}
        reached = sorted((m for m, x in found.items() if x is not None), key=lambda m: -found[m][0])
        cells = ["-" if x is None else f"{x[0]:.2f}" for x in found.values()]
        ahead = text(found[reached[0]] - found[reached[1]], "+") + f", {reached[1]}" if len(reached) > 1 else "-"
        lines.append(f"| {level:g} | {' | '.join(cells)} | {reached[0] if reached else '-'} | {ahead} |")
    return "\n".join(lines)


def differences(known: Mapping[tuple[str, str], Place], draws: Draws) -> str:
    """RLOO and GRPO less PPO, at each beta."""
    lines = ["| beta | PPO | RLOO less PPO | GRPO less PPO |", "| --- " * 4 + "|"]
    for method, beta in known:
        others = [known.get((other, beta)) for other in ("RLOO", "GRPO")]
        if method != "PPO":
            continue
        first = draws.mean(known["PPO", beta].gold).mean(axis=1)
        cells = ["-" if x is None else text(draws.mean(x.gold).mean(axis=1) - first, "+") for x in others]
        lines.append(f"| {beta} | {text(first)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tuning_report(done: Done) -> str:
    """What was tried, the judge of it, and what it cost in KL."""
    lines = ["| method | group size | learning rate | judge | KL | reward |", "| --- " * 6 + "|"]
    for settings, figures in done:
        (point,), config = figures["points"], settings["config"]
        judge, low, high = interval(Draws(1, len(point["gold"])).mean(np.array([point["gold"]])).mean(axis=1))
        lines.append(
            f"| {settings['method']} | {config['group_size']} | {config['learning_rate']:g} "
            f"| {judge:.2f} ({low:.2f} to {high:.2f}) | {np.mean(point['kl']):.2f} | {point['reward']:.2f} |"
        )
    return "\n".join(lines)
