"""Train a byte-level BPE vocabulary on text, and write it in OpenAI's two-file layout.

    python data/train_vocabulary.py data/world/demonstrations.train.jsonl --folder data/world-vocabulary

Takes about a second for the world. Sennrich et al. (2016), Algorithm 1, over bytes as in GPT-2: count adjacent
pairs within words, merge the most frequent pair everywhere, repeat.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import regex  # tiktoken brings it

from minirlhf.tokenizer import SPLIT_PATTERN, byte_symbols, write_ranks

VOCABULARY_SIZE = 768  # 256 bytes, the merges, and EOS
MINIMUM_COUNT = 2  # a pair seen once is not worth a token


def train(texts: Iterable[str], size: int = VOCABULARY_SIZE) -> dict[bytes, int]:
    """Learn merges until there are `size` tokens, EOS counted; returns token bytes -> id without EOS.

    Deterministic: of equally frequent pairs the one that is smallest in bytes is merged. Stops early, with fewer
    tokens, when no pair occurs twice.
    """
    counts = Counter(word.encode() for text in texts for word in regex.findall(SPLIT_PATTERN, text))
    words = [([bytes([byte]) for byte in word], count) for word, count in counts.items()]
    ranks = {bytes([byte]): i for i, byte in enumerate(byte_symbols())}
    while len(ranks) < size - 1:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for parts, count in words:
            for pair in pairwise(parts):
                pairs[pair] += count
        # Ids stand for bytes: a second way to spell a known token would be a second id for the same bytes.
        candidates = [pair for pair, count in pairs.items() if count >= MINIMUM_COUNT and b"".join(pair) not in ranks]
        if not candidates:
            break
        best = min(candidates, key=lambda pair: (-pairs[pair], pair))
        ranks[b"".join(best)] = len(ranks)
        for parts, _ in words:
            _merge(parts, best)
    return ranks


def _merge(parts: list[bytes], pair: tuple[bytes, bytes]) -> None:
    """Merge every occurrence of the pair in one word, from the left, in place."""
    i = 0
    while i < len(parts) - 1:
        if (parts[i], parts[i + 1]) == pair:
            parts[i : i + 2] = [b"".join(pair)]
        i += 1


def read_texts(path: Path) -> list[str]:
    """Prompts and responses of a file of demonstrations, apart, as the encoder will see them."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [record[field] for record in records for field in ("prompt", "response")]


def write(ranks: dict[bytes, int], folder: Path) -> None:
    """Write encoder.json and vocab.bpe."""
    folder.mkdir(parents=True, exist_ok=True)
    write_ranks(ranks, folder / "encoder.json", folder / "vocab.bpe")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a byte-level BPE vocabulary on demonstrations.")
    parser.add_argument("demonstrations", type=Path, help="JSONL file with prompt and response")
    parser.add_argument("--folder", type=Path, required=True, help="where encoder.json and vocab.bpe go")
    parser.add_argument("--size", type=int, default=VOCABULARY_SIZE, help="tokens, EOS counted (default: %(default)s)")
    arguments = parser.parse_args()
    ranks = train(read_texts(arguments.demonstrations), arguments.size)
    write(ranks, arguments.folder)
    print(f"{len(ranks) + 1} tokens in {arguments.folder}")


if __name__ == "__main__":
    main()
