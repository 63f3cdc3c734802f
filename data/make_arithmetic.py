"""Write small arithmetic with worked answers, in gsm8k's form: what ReFT learns on a CPU.

    python data/make_arithmetic.py --folder runs/arithmetic/problems

    {"question": "8+5-4+9", "answer": "8+5=13\\n13-4=9\\n9+9=18\\n#### 18"}

Writes demonstrations.jsonl (few problems, with worked answers: all that SFT has), problems.jsonl (many others, for RL,
which looks at nothing but whether the final answer is right) and test.jsonl (held out). No problem is in two files.
Everything follows from the constants and the seed: running it again gives the same bytes. The files are not part of the
project.
"""

import argparse
import json
import random
from pathlib import Path

SIZES = {"demonstrations": 350, "problems": 8000, "test": 500}
TERMS = 4
LARGEST = 9


def problem(random_: random.Random) -> tuple[str, str]:
    """A question with TERMS numbers and its answer, one operation a line; no intermediate result is below 0."""
    value = random_.randint(1, LARGEST)
    question, lines = str(value), []
    for _ in range(TERMS - 1):
        number = random_.randint(1, LARGEST)
        sign = "+" if number > value else random_.choice("+-")
        result = value + number if sign == "+" else value - number
        question += f"{sign}{number}"
        lines.append(f"{value}{sign}{number}={result}")
        value = result
    return question, "\n".join([*lines, f"#### {value}"])


def problems(count: int, seed: int) -> list[dict[str, str]]:
    """`count` different problems."""
    random_ = random.Random(f"arithmetic {seed}")
    found: dict[str, str] = {}
    while len(found) < count:
        question, answer = problem(random_)
        found.setdefault(question, answer)
    return [{"question": question, "answer": answer} for question, answer in found.items()]


def write(folder: Path, seed: int) -> dict[str, Path]:
    """Write the three files; their paths by name."""
    folder.mkdir(parents=True, exist_ok=True)
    every, files = problems(sum(SIZES.values()), seed), {}
    for name, size in SIZES.items():
        rows, every = every[:size], every[size:]
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/arithmetic/problems"), help="where to write")
    parser.add_argument("--seed", type=int, default=0, help="of the problems")
    arguments = parser.parse_args()
    for name, path in write(arguments.folder, arguments.seed).items():
        print(f"{path}: {SIZES[name]} problems")


if __name__ == "__main__":
    main()
