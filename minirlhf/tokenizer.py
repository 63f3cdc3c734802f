"""Text to token ids and back: byte-level BPE (GPT-2's), as `tiktoken.Encoding` objects.

Three named encodings, or a folder with a vocabulary file and a merges file, under OpenAI's names (encoder.json,
vocab.bpe) or Hugging Face's (vocab.json, merges.txt): the contents have the same format. The last id is always
the end of text, EOS. Text from users is encoded with `encode` only, which can never produce EOS.

Left out: special tokens other than EOS, and padding (rows are right-padded by length, so there is no pad token).
"""

import json
from collections.abc import Sequence
from pathlib import Path

import tiktoken

from minirlhf.files import write_json, write_text
from minirlhf.runtime import UserError, require

EOS = "<|endoftext|>"
WORLD_FOLDER = Path(__file__).resolve().parent.parent / "data" / "world-vocabulary"
FILE_NAMES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))  # OpenAI's, Hugging Face's

# GPT-2's pattern in tiktoken's form: possessive quantifiers match the same and never backtrack.
SPLIT_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


class TokenizerError(UserError, ValueError):
    """Files that are no tokenizer, or not this model's: what, where and how to fix it, in one line."""


class DownloadError(UserError, ConnectionError):
    """GPT-2's own vocabulary is neither here nor to be had."""


def byte_symbols() -> dict[int, str]:
    """The printable character that stands for each byte in vocabulary files, in GPT-2's order of ids.

    Bytes that print as themselves come first; the others, the space among them, are written as U+0100 and up.
    """
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def from_ranks(name: str, ranks: dict[bytes, int]) -> tiktoken.Encoding:
    """An encoding with the given merge ranks; EOS takes the id after the last."""
    special = {EOS: len(ranks)}
    return tiktoken.Encoding(name, pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special)


def load(name_or_folder: str | Path) -> tiktoken.Encoding:
    """Load an encoding.

    "world": the shipped vocabulary of the embedded world. "bytes": the 256 bytes, id = byte. "gpt2": tiktoken's own,
    downloaded on first use. Anything else is a folder; write ./gpt2 for a folder of that name.

    Raises TokenizerError for files that are missing, cannot be read or are not GPT-2's format, or, for "gpt2" without
    a network, DownloadError.
    """
    if name_or_folder == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:  # requests' errors are OSErrors; a damaged download is a ValueError
            raise DownloadError(
                "cannot download GPT-2's vocabulary: give a folder with encoder.json and vocab.bpe instead of 'gpt2', "
                "or set TIKTOKEN_CACHE_DIR to a folder where tiktoken has it"
            ) from error
    if name_or_folder == "bytes":
        return from_ranks("bytes", {bytes([byte]): byte for byte in range(256)})
    folder = WORLD_FOLDER if name_or_folder == "world" else Path(name_or_folder)
    for vocabulary_name, merges_name in FILE_NAMES:
        vocabulary, merges = folder / vocabulary_name, folder / merges_name
        if vocabulary.is_file() and merges.is_file():
            return from_ranks(str(name_or_folder), read_ranks(vocabulary, merges))
    raise TokenizerError(
        f"no tokenizer in {str(folder)!r}: it needs encoder.json and vocab.bpe, or vocab.json and merges.txt "
        f'(or give a name: "world", "gpt2", "bytes")'
    )


def read_ranks(vocabulary: Path, merges: Path) -> dict[bytes, int]:
    """Read token bytes -> id from the two files.

    tiktoken merges the pair with the lowest id first, so ids must follow the order of merges; this is checked.
    Raises TokenizerError where the files are not GPT-2's format, do not agree, or EOS is missing or not last.
    """
    byte_of = {symbol: byte for byte, symbol in byte_symbols().items()}
    try:
        ids = json.loads(_read_text(vocabulary))
    except json.JSONDecodeError as error:
        raise TokenizerError(f"{vocabulary}: not JSON ({error}); fetch the file again") from error
    lines = _read_text(merges).removesuffix("\n").split("\n")
    if lines[0] == "" or lines[0].startswith("#version"):
        lines = lines[1:]
    numbered = isinstance(ids, dict) and all(type(index) is int for index in ids.values())
    require(numbered, f"{vocabulary} must hold one JSON object, token to id", TokenizerError)
    last = ids.pop(EOS, None) == len(ids)
    require(last, f"{vocabulary}: {EOS} must be there and have the last id, {len(ids)}", TokenizerError)
    try:
        ranks = {bytes(byte_of[symbol] for symbol in token): index for token, index in ids.items()}
        pairs = [line.split(" ") for line in lines]
        expected = {left + right: 256 + i for i, (left, right) in enumerate(pairs)}
    except (KeyError, ValueError) as error:
        raise TokenizerError(f"{vocabulary} and {merges} are not a byte-level BPE vocabulary: {error}") from error
    single = {token: index for token, index in ids.items() if len(token) == 1}
    ordered = sorted(single.values()) == list(range(256)) and single | expected == ids
    order = f"ids must be those of the 256 bytes, then the merges of {merges} in order"
    require(ordered, f"{vocabulary}: {order}", TokenizerError)
    return ranks


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path}: cannot be read as UTF-8 text ({error}); fetch the file again") from error


def check_fits(encoding: tiktoken.Encoding, vocab_size: int, where: str | Path) -> None:
    """Raise TokenizerError unless a model of `vocab_size` tokens, read from `where`, has just its ids.

    Trap: with too small a model a text without rare tokens trains for a while before the first id outside the embedding
    stops it, on a GPU without saying why. A larger one, padded to a round number, can sample an id that is no token.
    """
    both = f"the tokenizer {encoding.name!r} has {encoding.n_vocab} ids, the model a vocabulary of {vocab_size}"
    advice = "give the tokenizer that the model was trained with"
    require(encoding.n_vocab == vocab_size, f"{where}: {both}; {advice}", TokenizerError)


def in_folder(folder: Path) -> bool:
    """True where a folder has the two files of a tokenizer; a model may be saved without them."""
    return any(all((folder / name).is_file() for name in names) for names in FILE_NAMES)


def same_ids(one: tiktoken.Encoding, other: tiktoken.Encoding) -> bool:
    """True where two tokenizers give the same ids to everything."""
    if one.n_vocab != other.n_vocab:
        return False
    ids = range(one.eot_token)
    return all(one.decode_single_token_bytes(i) == other.decode_single_token_bytes(i) for i in ids)


def write_ranks(ranks: dict[bytes, int], vocabulary: Path, merges: Path) -> None:
    """Write the two files that `read_ranks` reads."""
    symbol_of = byte_symbols()

    def spell(token: bytes) -> str:
        return "".join(symbol_of[byte] for byte in token)

    tokens = sorted(ranks, key=ranks.__getitem__)
    ids = {spell(token): ranks[token] for token in tokens} | {EOS: len(ranks)}
    lines = [" ".join(map(spell, _split_last_merge(token, ranks))) for token in tokens if len(token) > 1]
    write_text(vocabulary, json.dumps(ids) + "\n")
    write_text(merges, "\n".join(["#version: 0.2", *lines]) + "\n")


def _split_last_merge(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two parts that were merged into `token`: encode it with the merges that came before it."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [left + right for left, right in zip(parts, parts[1:], strict=False)]
        best = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(ranks)))
        parts[best : best + 2] = [pairs[best]]
    return parts


def save(encoding: tiktoken.Encoding, folder: str | Path) -> None:
    """Write vocab.json, merges.txt and tokenizer_config.json, from which `transformers` loads a GPT-2 tokenizer.

    The trap: there, "<|endoftext|>" inside a text is parsed as EOS; `encode` here never does that.
    """
    folder = Path(folder)
    ranks = {encoding.decode_single_token_bytes(i): i for i in range(encoding.eot_token)}
    write_ranks(ranks, folder / "vocab.json", folder / "merges.txt")
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,  # would drop spaces before punctuation when decoding
        "bos_token": EOS,
        "eos_token": EOS,
        "unk_token": EOS,
    }
    write_json(folder / "tokenizer_config.json", config)


def encode(encoding: tiktoken.Encoding, text: str) -> list[int]:
    """Encode any str, never producing EOS: "<|endoftext|>" in it is plain text.

    Lone surrogates, which no encoding can represent, become U+FFFD; a surrogate pair becomes its character.
    """
    well_formed = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return encoding.encode_ordinary(well_formed)


def decode(encoding: tiktoken.Encoding, ids: list[int]) -> str:
    """Decode ids, EOS included as its text; bytes that are not UTF-8 become U+FFFD."""
    return encoding.decode(ids, errors="replace")


def response_text(encoding: tiktoken.Encoding, response_ids: Sequence[int]) -> str:
    """The text of sampled ids, without the closing EOS."""
    return decode(encoding, [i for i in response_ids if i != encoding.eot_token])
