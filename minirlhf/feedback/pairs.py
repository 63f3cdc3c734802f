"""From labels to training data: one record for all that a labeller said about a prompt, split by prompt.

    python -m minirlhf.feedback pairs           # <run>/labels/labels.jsonl to <run>/labels/comparisons.jsonl
    python train_reward.py --comparisons runs/tiny/labels/comparisons.jsonl

Each labeller's first label of an item counts; skips and repeats do not. A record is a ranking (rank 0 is best), and
`train_reward.py` and `train_dpo.py` learn from all its pairs in one batch element. Pairs that were labelled one by one
become a ranking where every pair of a prompt's responses was labelled and no labels contradict each other; else they
stay records of two, because equal ranks would claim a tie that nobody saw.

`train_reward.py` learns whole rankings and models ties from the same records, where they were kept (`--objective`,
`--ties`); ties that count half can be written out here for `train_dpo.py`, which has no such setting.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from minirlhf.config import Range, Seed, Settings
from minirlhf.encode import Record, pairs_from_ranks, split_by_prompt
from minirlhf.evaluate.judges import VERDICTS, comparison_text
from minirlhf.feedback.agreement import first_labels
from minirlhf.feedback.labels import Label, read_labels
from minirlhf.files import write_records
from minirlhf.runtime import require

Ties = Literal["drop", "half", "keep"]
Form = Literal["rankings", "best", "verdicts"]


@dataclass
class Config(Settings):
    run: Path = Path("runs/tiny")
    """Folder of the run; reads and writes `<run>/labels`."""
    labels: tuple[Path, ...] = ()
    """Files of labels, by default `<run>/labels/labels.jsonl`."""
    form: Form = "rankings"
    """`rankings` give all pairs of a prompt; `best` only those of the best against each other one; `verdicts` are
    worked comparisons from which `train_sft.py` trains a judge (`label --by judge-model`)."""
    ties: Ties = "drop"
    """`drop` learns nothing from ties; `keep` leaves them to `train_reward.py --ties`; `half` counts a tie as half a
    win each way, by writing every record twice and a tie once each way: train for half the epochs then."""
    held_out_share: Annotated[float, Range(low=0, high=1, below=True)] = 0.0
    """Share of the prompts whose records go to `held-out.jsonl`, for measuring; training never sees them."""
    output: Path | None = None
    """File to write, by default `<run>/labels/comparisons.jsonl`; made anew each time."""
    seed: Seed = 0
    """Seed of the split."""


def main(config: Config) -> Path:
    """Write the records; returns the file to train from."""
    files = config.labels or (config.run / "labels" / "labels.jsonl",)
    output = config.output or config.run / "labels" / "comparisons.jsonl"
    require(output.resolve() not in [file.resolve() for file in files], f"--output {output}: holds the labels")
    labels = [label for file in files for label in read_labels(file)]
    records = training_records(labels, form=config.form, ties=config.ties)
    require(len(records) > 0, f"{len(labels)} labels, but none of them prefers one response; nothing to learn from")
    train, held_out = split_by_prompt(records, share=config.held_out_share, seed=config.seed)
    _write(output, train, config.form)
    pairs = sum(len(pairs_from_ranks(record["ranks"])) for record in train)
    print(f"{output}: {len(train)} records, {pairs} pairs, from {len(labels)} labels")
    if config.held_out_share:
        file = output.with_name("held-out.jsonl")
        _write(file, held_out, config.form)
        print(f"{file}: {len(held_out)} records of other prompts")
    return output


def _write(file: Path, records: Sequence[Record], form: Form) -> None:
    if form == "verdicts":
        records = [worked for record in records for worked in worked_comparisons(record)]
    write_records(file, records)


def worked_comparisons(record: Record) -> list[Record]:
    """Demonstrations of verdicts for `train_sft.py`: every pair of a ranking in both orders; ties teach nothing."""
    texts = record["responses"]
    return [
        {"prompt": comparison_text(record["prompt"], texts[a], texts[b]), "response": verdict}
        for better, worse in pairs_from_ranks(record["ranks"])
        for a, b, verdict in ((better, worse, VERDICTS[0]), (worse, better, VERDICTS[1]))
    ]


def training_records(labels: Sequence[Label], *, form: Form, ties: Ties) -> list[Record]:
    """Ranking records for training, in the order of the labels; see the head of this file."""
    records = join_pairs(first_labels(labels))
    tied = [pair for record in records for pair in _tied_pairs(record, form)] if ties == "half" else []
    if form == "best":
        records = [{**record, "ranks": [min(rank, 1) for rank in record["ranks"]]} for record in records]
    if ties == "keep":
        return records
    decided = [record for record in records if len(set(record["ranks"])) > 1]
    return [*decided, *decided, *tied] if ties == "half" else decided


def join_pairs(labels: Sequence[Label]) -> list[Record]:
    """One record a label; the pairs of a labeller on a prompt become one where they are a whole ranking."""
    groups: dict[tuple[str, str, int], list[Label]] = defaultdict(list)
    for label in labels:
        single = id(label) if len(label.responses) > 2 else 0  # a ranking stays by itself
        groups[label.labeller, label.prompt, single].append(label)
    records = []
    for group in groups.values():
        ranks = _ranks_from(group)
        alone = [([label], dict(zip(label.responses, label.ranks, strict=True))) for label in group]
        records += [_record(*part) for part in ([(group, ranks)] if ranks else alone)]
    return records


def _record(group: Sequence[Label], ranks: dict[str, int]) -> Record:
    """A ranking of the texts in `ranks`, with the columns that all labels of the group have."""
    first = group[0]
    record = {"prompt": first.prompt, "responses": list(ranks), "ranks": list(ranks.values())}
    record["labeller"] = first.labeller
    for name in ("sources", "response_ids"):
        if all(getattr(label, name) is not None for label in group):
            values = {t: v for label in group for t, v in zip(label.responses, getattr(label, name), strict=True)}
            record[name] = [values[text] for text in ranks]
    return record


def _ranks_from(group: Sequence[Label]) -> dict[str, int] | None:
    """The ranks that make exactly these labels of pairs; None where a pair is missing or they contradict each other."""
    texts = list(dict.fromkeys(text for label in group for text in label.responses))
    if len(group) == 1 or len(group) != len(texts) * (len(texts) - 1) // 2:
        return None
    points = dict.fromkeys(texts, 0)  # 2 for a win, 1 for a tie
    for label in group:
        for text, rank in zip(label.responses, label.ranks, strict=True):
            points[text] += 2 - 2 * rank if len(set(label.ranks)) > 1 else 1
    levels = sorted(set(points.values()), reverse=True)
    ranks = {text: levels.index(points[text]) for text in texts}
    for label in group:
        (one, two), (mine, theirs) = label.ranks, (ranks[text] for text in label.responses)
        if (mine > theirs) - (mine < theirs) != one - two:
            return None
    return ranks


def _tied_pairs(record: Record, form: Form) -> list[Record]:
    """Every tie of a record as two records of two, one each way; where the best alone are compared, of the best."""
    ranks, made = record["ranks"], []
    for i, j in itertools.combinations(range(len(ranks)), 2):
        if ranks[i] == ranks[j] and (form == "rankings" or ranks[i] == 0):
            columns = ("responses", "sources", "response_ids")
            pair = record | {name: [record[name][i], record[name][j]] for name in columns if name in record}
            made += [{**pair, "ranks": [0, 1]}, {**pair, "ranks": [1, 0]}]
    return made
