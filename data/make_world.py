"""Write the files of the embedded world: prompts in three splits, demonstrations, and the vocabulary.

    python data/make_world.py                  # rewrites data/world and data/world-vocabulary
    python data/make_world.py --folder /tmp/x  # writes the same bytes elsewhere

Takes a few seconds. Everything follows from the constants below and those in minirlhf/world: running it again
gives the same bytes. The shares of the writers are `SHARES` in minirlhf/world/writers.py.
"""

import argparse
import json
import random
from pathlib import Path

import train_vocabulary

from minirlhf import world

SEED = 0
# Prompts by kind of question: training, validation, test. A prompt is in one split only.
QUOTAS = {
    "one_fact": (330, 35, 80),
    "two_facts": (800, 50, 110),
    "yes_no": (500, 45, 95),
    "follow_up": (130, 15, 40),
    "unknown": (400, 40, 80),
    "harmful": (400, 40, 80),
    "lookalike": (400, 40, 80),
}
SPLITS = ("train", "validation", "test")
DEMONSTRATIONS = {"train": 2, "validation": 1}  # for each prompt, by different draws of the writer


def split_prompts() -> dict[str, list[world.Question]]:
    """Draw each split's questions, kind by kind, and shuffle them."""
    splits: dict[str, list[world.Question]] = {split: [] for split in SPLITS}
    for kind, sizes in QUOTAS.items():
        pool = _pool(kind)
        for split, size in zip(SPLITS, sizes, strict=True):
            splits[split] += [pool.pop() for _ in range(size)]
    for split, questions in splits.items():
        random.Random(f"order {SEED} {split}").shuffle(questions)
    return splits


def _pool(kind: str) -> list[world.Question]:
    pool = [question for question in world.questions().values() if question.kind == kind]
    random.Random(f"split {SEED} {kind}").shuffle(pool)
    if kind == "yes_no":
        # There are seven wrong values for each right one: keep as many questions of either verdict.
        right = [question for question in pool if question.confirmed]
        wrong = [question for question in pool if not question.confirmed][: len(right)]
        pool = [question for pair in zip(right, wrong, strict=True) for question in pair]
    return pool


def demonstrate(questions: list[world.Question], count: int) -> list[dict[str, object]]:
    """`count` demonstrations of each prompt; `seed` is the number of the draw, and gives the same text again."""
    records = []
    for seed in range(count):
        for question in questions:
            response, writer = world.demonstrate(question.prompt, seed)
            records.append({"prompt": question.prompt, "response": response, "writer": writer, "seed": seed})
    return records


def write_records(path: Path, records: list[dict[str, object]]) -> None:
    """One JSON object a line, non-ASCII as it is, line ends the same on every system."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def make(folder: Path) -> None:
    """Write world/ and world-vocabulary/ below `folder`."""
    target = folder / "world"
    target.mkdir(parents=True, exist_ok=True)
    for split, questions in split_prompts().items():
        prompts = [{"prompt": question.prompt, "kind": question.kind} for question in questions]
        write_records(target / f"prompts.{split}.jsonl", prompts)
        if split in DEMONSTRATIONS:
            demonstrations = demonstrate(questions, DEMONSTRATIONS[split])
            write_records(target / f"demonstrations.{split}.jsonl", demonstrations)
    texts = train_vocabulary.read_texts(target / "demonstrations.train.jsonl")
    train_vocabulary.write(train_vocabulary.train(texts), folder / "world-vocabulary")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the files of the embedded world.")
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parent, help="default: data/")
    make(parser.parse_args().folder)


if __name__ == "__main__":
    main()
