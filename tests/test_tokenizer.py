"""The tokenizer: any text comes back, user text never gives EOS, tiktoken and transformers read the files alike."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import regex
import tiktoken
import tiktoken.load
from hypothesis import given, settings
from hypothesis import strategies as st

from minirlhf import runtime, tokenizer
from minirlhf.config import run_script

DATA = Path(__file__).resolve().parent.parent / "data"
REAL_DATA = os.environ.get("MINIRLHF_REAL_DATA")
WORLD = tokenizer.load("world")
BYTES = tokenizer.load("bytes")
ENCODINGS = pytest.mark.parametrize("encoding", [WORLD, BYTES], ids=["world", "bytes"])
needs_real_data = pytest.mark.skipif(REAL_DATA is None, reason="MINIRLHF_REAL_DATA is not set")

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
PIECES = st.sampled_from(
    ["<|endoftext|>", "<|", "|>", " The lion", "\n\n", "\x00", "\u00e9", "\U0001f600", " ", "'s", "7"]
)
ANY_TEXT = st.one_of(TEXT, st.lists(st.one_of(PIECES, TEXT)).map("".join))


def load_script(name: str) -> object:
    spec = importlib.util.spec_from_file_location(name, DATA / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- encode and decode -------------------------------------------------------------------------------------------


@ENCODINGS
@settings(max_examples=200, deadline=None)
@given(text=ANY_TEXT)
def test_any_text_comes_back(encoding: tiktoken.Encoding, text: str) -> None:
    ids = tokenizer.encode(encoding, text)
    assert tokenizer.decode(encoding, ids) == text
    assert all(0 <= i < encoding.eot_token for i in ids)


@ENCODINGS
def test_the_name_of_eos_is_plain_text(encoding: tiktoken.Encoding) -> None:
    for text in ("<|endoftext|>", "a<|endoftext|><|endoftext|> b", "\n\nHuman: <|endoftext|>"):
        ids = tokenizer.encode(encoding, text)
        assert encoding.eot_token not in ids
        assert tokenizer.decode(encoding, ids) == text
    assert tokenizer.decode(encoding, [encoding.eot_token]) == "<|endoftext|>"
    assert encoding.eot_token == encoding.n_vocab - 1


@ENCODINGS
def test_lone_surrogates_become_the_replacement_character(encoding: tiktoken.Encoding) -> None:
    def there_and_back(text: str) -> str:
        return tokenizer.decode(encoding, tokenizer.encode(encoding, text))

    assert there_and_back("a\ud800b") == "a\ufffdb"
    assert there_and_back("\udc00\ud800") == "\ufffd\ufffd"
    assert there_and_back("\ud83d\ude00") == "\U0001f600"  # a pair is one character
    assert there_and_back("\ufeffa\x00") == "\ufeffa\x00"  # no byte order mark is eaten


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters()))
def test_any_str_can_be_encoded(text: str) -> None:
    assert WORLD.eot_token not in tokenizer.encode(WORLD, text)


@ENCODINGS
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_ids_can_be_decoded(encoding: tiktoken.Encoding, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, encoding.eot_token)))
    assert isinstance(tokenizer.decode(encoding, ids), str)


def test_bytes_are_their_own_ids() -> None:
    assert tokenizer.encode(BYTES, "A \u00e9") == [65, 32, 195, 169]
    assert (BYTES.n_vocab, BYTES.eot_token) == (257, 256)


def test_long_runs_do_not_break_the_split() -> None:
    for text in (" " * 100_000, "a" * 100_000, "^" * 100_000, " \n" * 50_000):
        assert tokenizer.decode(WORLD, tokenizer.encode(WORLD, text)) == text


# --- the shipped vocabulary --------------------------------------------------------------------------------------


def test_each_word_of_the_world_is_one_token() -> None:
    assert 512 <= WORLD.n_vocab <= 1024
    lines = (DATA / "world" / "demonstrations.train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = {record[field] for record in map(json.loads, lines) for field in ("prompt", "response")}
    words = {word for text in texts for word in regex.findall(tokenizer.SPLIT_PATTERN, text)}
    assert {word for word in words if len(tokenizer.encode(WORLD, word)) != 1} == set()


def test_dialogues_are_short() -> None:
    lines = (DATA / "world" / "demonstrations.train.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert max(len(tokenizer.encode(WORLD, record["prompt"])) for record in records) <= 36
    assert max(len(tokenizer.encode(WORLD, record["response"])) for record in records) <= 24


def test_training_by_hand() -> None:
    train = load_script("train_vocabulary").train
    # abab 3 times, " cd" and xy twice, qr once. Pairs: ab 6, ba 3; " c", cd and xy 2; qr 1, too rare for a token.
    # First ab, then (ab, ab) with 3. Of those with 2 the smallest in bytes is " " + c; then " c" + d; then xy.
    learnt = list(train(["abab"] * 3 + [" cd"] * 2 + ["xy"] * 2 + ["qr"], 1000))[256:]
    assert learnt == [b"ab", b"abab", b" c", b" cd", b"xy"]
    assert len(train(["abab"] * 3, 258)) == 257  # EOS is the 258th


# --- files -------------------------------------------------------------------------------------------------------


def same(a: tiktoken.Encoding, b: tiktoken.Encoding) -> bool:
    tokens = [[e.decode_single_token_bytes(i) for i in range(e.n_vocab)] for e in (a, b)]
    return tokens[0] == tokens[1] and a.eot_token == b.eot_token


def openai_ranks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[bytes, int]:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # its cache is keyed by path, and would return an older file
    return tiktoken.load.data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))


def test_tiktoken_reads_the_shipped_files_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = DATA / "world-vocabulary"
    ranks = tokenizer.read_ranks(folder / "encoder.json", folder / "vocab.bpe")
    assert openai_ranks(folder, monkeypatch) == ranks
    assert len(ranks) == WORLD.eot_token


@ENCODINGS
def test_saved_folders_load_again(encoding: tiktoken.Encoding, tmp_path: Path) -> None:
    tokenizer.save(encoding, tmp_path / "model")
    assert same(tokenizer.load(tmp_path / "model"), encoding)
    assert same(tokenizer.load(str(tmp_path / "model")), encoding)


TRICKY = [
    " The lion eats meat and lives in the desert.",
    "\n\nHuman: What does the lion eat?\n\nAssistant:",
    "",
    "  two  spaces \n\n\n and\ttabs  ",
    "it's WE'LL o'clock 12345 \u00bd",
    "na\u00efve \u4f60\u597d \U0001f600\u200d \x00 \ufeff \u2028x",
    " . , ! don 't n 't",  # clean-up of spaces would join these
]


@ENCODINGS
def test_transformers_encodes_alike(encoding: tiktoken.Encoding, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(encoding, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == encoding.eot_token and len(theirs) == encoding.n_vocab
    assert theirs.clean_up_tokenization_spaces is False  # some versions would drop spaces before punctuation
    for text in TRICKY:
        ids = tokenizer.encode(encoding, text)
        assert theirs(text)["input_ids"] == ids, text
        assert theirs.decode(ids) == text

    @settings(max_examples=200, deadline=None)
    @given(TEXT.filter(lambda text: tokenizer.EOS not in text))  # which transformers parses as EOS, see `save`
    def alike(text: str) -> None:
        assert theirs(text)["input_ids"] == tokenizer.encode(encoding, text)

    alike()


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(tokenizer.TokenizerError, match="encoder.json and vocab.bpe, or vocab.json and merges.txt"):
        tokenizer.load(tmp_path / "nowhere")
    tokenizer.save(WORLD, tmp_path)
    vocabulary, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    ids, lines = json.loads(vocabulary.read_text(encoding="utf-8")), merges.read_text(encoding="utf-8").splitlines()

    def rejects(new_ids: object, new_lines: list[str], match: str) -> None:
        vocabulary.write_text(json.dumps(new_ids), encoding="utf-8")
        merges.write_text("\n".join(new_lines) + "\n", encoding="utf-8")
        with pytest.raises(tokenizer.TokenizerError, match=match):
            tokenizer.load(tmp_path)

    rejects({token: i for token, i in ids.items() if token != tokenizer.EOS}, lines, "last id")
    rejects(ids | {tokenizer.EOS: 5}, lines, "last id")
    rejects(ids, [lines[0], lines[2], lines[1], *lines[3:]], "in order")  # ids no longer follow the merges
    rejects(ids, lines[:-1], "in order")
    rejects(ids, [*lines[:-1], "a b c"], "byte-level BPE")
    rejects({"\u4f60" if token == "A" else token: i for token, i in ids.items()}, lines, "byte-level BPE")
    rejects([1, 2], lines, "JSON object")
    rejects(ids | {"A": None}, lines, "JSON object, token to id")
    rejects(ids | {"A": "32"}, lines, "JSON object, token to id")


def test_files_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer.save(WORLD, tmp_path)
    vocabulary, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    text = vocabulary.read_text(encoding="utf-8")
    vocabulary.write_text(text[: len(text) // 2], encoding="utf-8")
    with pytest.raises(tokenizer.TokenizerError, match=r"vocab\.json: not JSON"):
        tokenizer.load(tmp_path)
    vocabulary.write_text(text, encoding="utf-8")
    merges.write_bytes(b"#version: 0.2\n\xff\xfe a\n")
    with pytest.raises(tokenizer.TokenizerError, match=r"merges\.txt: cannot be read as UTF-8"):
        tokenizer.load(tmp_path)

    def forbidden(path: Path, **_: object) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", forbidden)  # as root one may read every file
    with pytest.raises(tokenizer.TokenizerError, match=r"vocab\.json: cannot be read .*Permission denied"):
        tokenizer.load(tmp_path)


@pytest.mark.parametrize("size", [256, 264])  # too small; padded, so that it could sample what is no token
def test_a_tokenizer_that_is_not_the_models_is_refused(size: int) -> None:
    tokenizer.check_fits(BYTES, 257, "some/model")
    expected = rf"some/model: the tokenizer 'bytes' has 257 ids, the model a vocabulary of {size}; give the tokenizer"
    with pytest.raises(tokenizer.TokenizerError, match=expected):
        tokenizer.check_fits(BYTES, size, Path("some/model"))


@dataclass
class Config:
    tokenizer: str = "world"


def refuse_small_model(config: Config) -> None:
    tokenizer.check_fits(tokenizer.load(config.tokenizer), 100, "some/model")


@pytest.mark.parametrize(
    ("name", "main", "message"),
    [
        ("nowhere", lambda config: tokenizer.load(config.tokenizer), "no tokenizer in 'nowhere'"),
        ("broken", lambda config: tokenizer.load(config.tokenizer), "last id"),
        ("gpt2", lambda config: tokenizer.load(config.tokenizer), "cannot download"),
        ("world", refuse_small_model, "some/model: the tokenizer 'world'"),
    ],
)
def test_scripts_end_with_code_2_and_one_line(name, main, message, tmp_path, monkeypatch, capsys) -> None:
    def offline(name: str) -> None:
        raise OSError("no route to host")

    tokenizer.save(WORLD, tmp_path / "broken")
    (tmp_path / "broken" / "vocab.json").write_text("{}", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    monkeypatch.setattr(sys, "argv", ["script", "--tokenizer", name])
    with pytest.raises(SystemExit) as caught:
        run_script(main, {"only": Config()})
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


def test_gpt2_without_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(ConnectionError, match="give a folder.*TIKTOKEN_CACHE_DIR") as caught:
        tokenizer.load("gpt2")
    assert "\n" not in str(caught.value) and isinstance(caught.value, runtime.UserError)

    def damaged(name: str) -> None:
        raise ValueError("Hash mismatch for data downloaded")

    monkeypatch.setattr(tiktoken, "get_encoding", damaged)
    with pytest.raises(tokenizer.DownloadError, match="give a folder"):
        tokenizer.load("gpt2")


@needs_real_data
def test_the_original_gpt2_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(REAL_DATA) / "gpt2-tokenizer"
    gpt2 = tokenizer.load(folder)
    assert (gpt2.n_vocab, gpt2.eot_token) == (50257, 50256)
    assert tokenizer.encode(gpt2, "Hello world") == [15496, 995]
    assert tokenizer.encode(gpt2, "Hello, my dog is cute") == [15496, 11, 616, 3290, 318, 13779]
    assert openai_ranks(folder, monkeypatch) == tokenizer.read_ranks(folder / "encoder.json", folder / "vocab.bpe")
    tokenizer.save(gpt2, tmp_path)
    # The merges are recovered exactly, in order, from the ranks alone.
    assert (tmp_path / "merges.txt").read_bytes() == (folder / "vocab.bpe").read_bytes()
    assert json.loads((tmp_path / "vocab.json").read_bytes()) == json.loads((folder / "encoder.json").read_bytes())
