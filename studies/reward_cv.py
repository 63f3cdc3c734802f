"""Reward models on real comparisons: 5-fold cross-validation against a linear model and "the longer response wins".

    MINIRLHF_REAL_DATA=<folder> OMP_NUM_THREADS=1 python studies/reward_cv.py

Every pair of the three kinds in preference/ is judged by models that never saw its first human turn: all pairs that
begin with the same turn, of whatever kind, are in one fold. The score is the mean over a few reward models that
differ in their seed. The linear model (linear.py) sees the same folds. Finished folds are kept in --work and not
trained again. The vocabulary is trained on the texts of all folds, both sides of a pair alike, and knows no label.
Writes <date>-reward-cv.json and .md to --out.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import linear
import paired
import project  # noqa: F401  first: it finds the package
import real
import tiktoken
import torch
from folds import FILES, FOLDS, first_turn, fold_of, read_pairs
from reward_recipe import RECIPES, Config, comparisons, margins, resolved, settings, train, train_trunk
from torch import Tensor

from minirlhf import tokenizer
from minirlhf.config import run_script
from minirlhf.encode import Record
from minirlhf.runtime import UserError


def encoding_of(kind: str, records: dict[str, list[Record]], config: Config) -> tiktoken.Encoding:
    """The vocabulary for a kind of pairs."""
    kinds = RECIPES[kind].texts
    texts = [r[side] for other in kinds for r in records[other] for side in ("prompt", "chosen", "rejected")]
    name = "-".join(("vocabulary", *kinds, str(config.vocabulary)))
    return tokenizer.load(real.vocabulary(texts, config.vocabulary, config.work / name))


# ---------------------------------------------------------------------------------------------------- cross-validation
def held_out_margins(
    encoding: tiktoken.Encoding, known: list[Record], held_out: list[Record], config: Config, fold: int
) -> dict[str, list[list[float]]]:
    """Margins of the held-out pairs by each member, trained on the known ones alone."""
    training, judged = (comparisons(encoding, records, config.prompt_tokens) for records in (known, held_out))
    seeds = [1000 * config.seed + 100 * fold + member for member in range(config.members)]
    # Each member has a trunk of its own: members that share one make the same mistakes.
    models = (train(train_trunk(encoding, known, config, seed), training, config, seed) for seed in seeds)
    return {"margins": [[round(m, 5) for m in margins(model, judged).tolist()] for model in models]}


def kept(path: Path, made_with: dict[str, object], make: Callable[[], dict[str, object]]) -> dict[str, object]:
    """What `make` gives, from `path` where an earlier run with the same settings has left it."""
    if path.exists():
        found = json.loads(path.read_text())
        if found["settings"] != made_with:
            raise UserError(f"{path}: made with other settings; give another --work, or remove the folder")
        return found
    started = time.perf_counter()
    found = {"settings": made_with, **make()}
    path.write_text(json.dumps(found) + "\n")
    print(f"{path}: {time.perf_counter() - started:.0f} seconds", flush=True)
    return found


def cross_validate(
    kind: str, records: list[Record], folds: Tensor, encoding: tiktoken.Encoding, config: Config
) -> Tensor:
    """(members, N) margins of all pairs, those of each fold by models trained on the others; nan in folds left out."""
    found = torch.full((config.members, len(records)), torch.nan)
    for fold in config.folds:
        known, held_out = ([r for r, f in zip(records, folds, strict=True) if (f == fold) == out] for out in (0, 1))
        make = partial(held_out_margins, encoding, known, held_out, config, fold)
        found[:, folds == fold] = torch.tensor(
            kept(config.work / f"{kind}-{fold}.json", settings(config), make)["margins"]
        )
    return found


def fit_linear(pairs: Sequence[linear.Pair], turns: Sequence[str], folds: Tensor, seed: int) -> dict[str, object]:
    """Margins of all pairs by the linear model, and the setting of every fold."""
    inner = fold_of(turns, linear.INNER_FOLDS, seed=seed + 1)
    found, chosen = linear.cross_validate(pairs, folds, torch.tensor([inner[turn] for turn in turns]))
    return {"margins": found.tolist(), "chosen": [dataclasses.asdict(setting) for setting in chosen]}


# ------------------------------------------------------------------------------------------------------------- results
def one_kind(kind: str, every: dict[str, list[Record]], folds: dict[str, int], config: Config) -> dict[str, object]:
    """Cross-validate both models on one kind of pairs: the result over all folds held out, and each fold's."""
    records, encoding = every[kind], encoding_of(kind, every, config)
    turns = [first_turn(r) for r in records]
    fold = torch.tensor([folds[turn] for turn in turns])
    pairs = [(r["chosen"], r["rejected"]) for r in records]
    make = partial(fit_linear, pairs, turns, fold, config.seed)
    baseline = kept(config.work / f"{kind}-linear.json", {"seed": config.seed}, make)
    member_margins = cross_validate(kind, records, fold, encoding, config)
    longer = torch.tensor([float(len(chosen) - len(rejected)) for chosen, rejected in pairs])

    def measured(part: Sequence[int]) -> dict[str, object]:
        rows = torch.isin(fold, torch.tensor(part))
        others = {"linear": torch.tensor(baseline["margins"])[rows], "longer": longer[rows]}
        where = [turn for turn, inside in zip(turns, rows.tolist(), strict=True) if inside]
        return paired.measure(member_margins[:, rows], others, where, seed=config.seed)

    return {
        **measured(config.folds),
        "folds": {number: measured([number]) for number in config.folds},
        "linear_settings": baseline["chosen"],
    }


def main(config: Config) -> Path:
    """Cross-validate, and write the result; returns the path of the JSON file."""
    torch.set_num_threads(1)
    records = read_pairs(real.data_folder())
    config.work.mkdir(parents=True, exist_ok=True)
    folds = fold_of([first_turn(r) for kind in FILES for r in records[kind]], FOLDS, seed=config.seed)
    recipes = {kind: resolved(config, kind) for kind in config.kinds}
    results = {kind: one_kind(kind, records, folds, recipe) for kind, recipe in recipes.items()}
    facts = real.circumstances(
        held_out_folds=list(config.folds), settings={kind: settings(recipe) for kind, recipe in recipes.items()}
    )
    stem = config.out / f"{datetime.date.today()}-reward-cv"
    config.out.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")
    stem.with_suffix(".md").write_text(paired.page(facts, results))
    print(paired.table(results))
    return stem.with_suffix(".json")


if __name__ == "__main__":
    run_script(main, {"default": Config()})
