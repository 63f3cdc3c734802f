"""Data readers: every format by its content, what is left out and counted, and the real files, read in place."""

from __future__ import annotations

import gzip
import json
import os
import runpy
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import train_dpo
import train_ppo
import train_reward
import train_sft
from minirlhf import data, tokenizer
from minirlhf.data import __main__ as check
from minirlhf.encode import encode_demonstration, encode_demonstrations
from minirlhf.files import write_records
from minirlhf.model import GPT, GPTConfig
from minirlhf.runtime import UserError

BYTES = tokenizer.load("bytes")
ROOT = Path(__file__).resolve().parent.parent


def turn(text: str) -> str:
    return f"\n\nHuman: {text}\n\nAssistant:"


def pair(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def demonstration(prompt: str, response: str) -> dict[str, str]:
    return {"prompt": prompt, "response": response}


def jsonl(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def chat(*turns: str) -> list[dict[str, str]]:
    """Messages that take turns, a user's first."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


HH = turn("Hi") + " Hello.\n\nHuman: And?\n\nAssistant:"
LABELLED = {"annotations": [{"completed_by": 3, "result": [{"type": "pairwise", "value": {"selected": "right"}}]}]}
TASK = {"prompt": "Q?", "answer1": "one", "answer2": "two"}

# (name, content of the file, kind that is asked for, the records)
FORMATS: list[tuple[str, str, data.Kind | None, list[dict[str, Any]]]] = [
    (
        "the project's pairs keep their other fields",
        jsonl({**pair(turn("a"), " b", " c"), "labeller": "x"}),
        None,
        [{**pair(turn("a"), " b", " c"), "labeller": "x"}],
    ),
    (
        "the project's demonstrations as they stand",
        jsonl({**demonstration("The film", " was  good "), "seed": 1}),
        None,
        [{**demonstration("The film", " was  good "), "seed": 1}],
    ),
    (
        "a prompt that ends with a colon",
        jsonl(demonstration("TL;DR:", "short")),
        None,
        [demonstration("TL;DR:", " short")],
    ),
    (
        "texts that would run into each other",
        jsonl(pair("Why?", "So.", "No!")),
        None,
        [pair(turn("Why?"), " So.", " No!")],
    ),
    (
        "whole texts beside their prompt",
        jsonl(pair("Once", "Once upon", "Once more")),
        None,
        [pair("Once", " upon", " more")],
    ),
    (
        "Anthropic HH, two turns",
        jsonl({"chosen": HH + " Yes. ", "rejected": HH + " No."}),
        None,
        [pair(HH, " Yes.", " No.")],
    ),
    (
        "Anthropic HH, the word Assistant in an answer",
        jsonl({"chosen": turn("a") + " Human: and Assistant: b", "rejected": turn("a") + "  c"}),
        None,
        [pair(turn("a"), " Human: and Assistant: b", " c")],
    ),
    (
        "a shared start, up to a whole word",
        jsonl({"chosen": "It was a great day", "rejected": "It was a grey day"}),
        None,
        [pair("It was a", " great day", " grey day")],
    ),
    ("no shared start", jsonl({"chosen": "Good.", "rejected": "Bad."}), None, [pair("", "Good.", "Bad.")]),
    (
        "a side that is the start of the other",
        jsonl({"chosen": "It is so", "rejected": "It is so bad"}),
        None,
        [pair("It is", " so", " so bad")],
    ),
    (
        "pairs as message lists",
        jsonl({"chosen": chat("a", "b", "c", "d"), "rejected": chat("a", "b", "c", "e")}),
        None,
        [pair(turn("a") + " b" + turn("c"), " d", " e")],
    ),
    (
        "pairs as message lists, the prompt a list of its own",
        jsonl(pair(chat("a"), chat("", "b")[1:], chat("", "c")[1:])),
        None,
        [pair(turn("a"), " b", " c")],
    ),
    (
        "pairs as message lists, the prompt once more as text",
        jsonl(pair("a", chat("a", "b"), chat("a", "c"))),
        None,
        [pair(turn("a"), " b", " c")],
    ),
    (
        "chat with a system message, last turn is learned",
        jsonl({"messages": [{"role": "system", "content": "Be kind."}, *chat("a", "b", "c", " d ")]}),
        None,
        [demonstration("Be kind." + turn("a") + " b" + turn("c"), " d")],
    ),
    (
        "chat, other names",
        jsonl({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}),
        None,
        [demonstration(turn("a"), " b")],
    ),
    (
        "chat, content in parts",
        jsonl({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, chat("", "b")[1]]}),
        None,
        [demonstration(turn("a"), " b")],
    ),
    (
        "chat that waits for an answer",
        jsonl({"messages": chat("a", "b", "c")}),
        "prompts",
        [{"prompt": turn("a") + " b" + turn("c")}],
    ),
    (
        "Alpaca",
        json.dumps(
            [{"instruction": "Add.", "input": "1 1", "output": "2"}, {"instruction": "Hi", "input": "", "output": "Ho"}]
        ),
        None,
        [demonstration(turn("Add.\n1 1"), " 2"), demonstration(turn("Hi"), " Ho")],
    ),
    (
        "Alpaca with pairs",
        json.dumps([{"instruction": "Add.", "input": "", "output": "2", "rejected": "3", "chosen": "2!"}]),
        None,
        [pair(turn("Add."), " 2!", " 3")],
    ),
    (
        "Alpaca with pairs, as demonstrations: its own output",
        json.dumps([{"instruction": "Add.", "input": "", "output": "2", "rejected": "3", "chosen": "2!"}]),
        "demonstrations",
        [demonstration(turn("Add."), " 2")],
    ),
    (
        "instances",
        jsonl({"instruction": "Do", "instances": [{"input": "", "output": "a"}, {"input": "b", "output": "c"}]}),
        None,
        [demonstration(turn("Do"), " a"), demonstration(turn("Do\nb"), " c")],
    ),
    ("completions", jsonl({"prompt": "x ->", "completion": " y"}), None, [demonstration("x ->", " y")]),
    (
        "questions",
        jsonl({"question": "1+1?", "answer": "2\n#### 2"}),
        None,
        [demonstration(turn("1+1?"), " 2\n#### 2")],
    ),
    (
        "Label Studio",
        json.dumps([{"id": 1, "data": TASK, **LABELLED}]),
        None,
        [{**pair(turn("Q?"), " two", " one"), "labeller": 3}],
    ),
    (
        "Label Studio, short export",
        json.dumps([{**TASK, "preference": {"selected": "left"}}]),
        None,
        [pair(turn("Q?"), " one", " two")],
    ),
    (
        "rankings",
        jsonl({"prompt": "p", "responses": [" a", " b"], "ranks": [1, 0], "response_ids": [[1], [2]]}),
        None,
        [{"prompt": "p", "responses": [" a", " b"], "ranks": [1, 0], "response_ids": [[1], [2]]}],
    ),
    ("rated text", jsonl({"text": "Nice.", "label": 1}), None, [{**demonstration("", "Nice."), "rating": 1.0}]),
    ("texts", jsonl({"text": "Once. "}), None, [demonstration("", "Once. ")]),
    ("prompts", jsonl({"prompt": " The"}), None, [{"prompt": " The"}]),
    ("JSON strings", jsonl("Hi?", "Ho?"), None, [{"prompt": turn("Hi?")}, {"prompt": turn("Ho?")}]),
    (
        "TSV, rating last",
        'a "q" \tb\t-1.5\nc\t2\n',
        None,
        [{**demonstration("", 'a "q" \tb'), "rating": -1.5}, {**demonstration("", "c"), "rating": 2.0}],
    ),
    (
        "TSV, id rating text",
        "7\t0.5\ta\tb\r\n8\t1\tc\r\n",
        None,
        [{**demonstration("", "a\tb"), "rating": 0.5}, {**demonstration("", "c"), "rating": 1.0}],
    ),
    (
        "TSV, rating first",
        "0.5\ta\n1\tc\n",
        None,
        [{**demonstration("", "a"), "rating": 0.5}, {**demonstration("", "c"), "rating": 1.0}],
    ),
    ("TSV with names", "question\tanswer\na\tb\n", None, [demonstration(turn("a"), " b")]),
    (
        "plain text",
        "First line,\r\n\r\n sec\rond {line}\n",
        None,
        [demonstration("", "First line,\n\n sec\rond {line}")],
    ),
    (
        "the chosen answers of pairs",
        jsonl(pair(turn("a"), " b", " c")),
        "demonstrations",
        [demonstration(turn("a"), " b")],
    ),
    (
        "the prompts of pairs, each once",
        jsonl(pair("a:", " b", " c"), pair("a:", " d", " e")),
        "prompts",
        [{"prompt": "a:"}],
    ),
    (
        "U+2028 ends no line",
        '{"prompt": "a\u2028b"}\n\n{"prompt": "c\\u0000d"}',
        None,
        [{"prompt": "a\u2028b"}, {"prompt": "c\x00d"}],
    ),
]


@pytest.mark.parametrize(
    ("content", "kind", "records"), [case[1:] for case in FORMATS], ids=[case[0] for case in FORMATS]
)
def test_formats(content: str, kind: data.Kind | None, records: list[dict[str, Any]], tmp_path: Path) -> None:
    file = tmp_path / "a.misleading-name"
    file.write_bytes(content.encode())
    found = data.read(file, kind)
    assert not found.bad and not +(found.left_out - Counter({"a prompt that came before": 1}))
    assert found.records == records
    packed = tmp_path / "packed.txt"
    packed.write_bytes(gzip.compress(content.encode()))
    assert data.load(packed, found.kind) == records


def test_parquet(tmp_path: Path) -> None:
    rows = [{"question": "a", "answer": "b"}, {"question": "c", "answer": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:1]), tmp_path / "a.json")
    assert data.load(tmp_path / "a.json", "demonstrations") == [demonstration(turn("a"), " b")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b")
    with pytest.raises(UserError, match=r"b:2: the field 'answer' is null"):
        data.load(tmp_path / "b", "demonstrations")


# (reason, a row of a file whose other row is whole, kind)
LEFT_OUT = [
    ("an empty response", {"chosen": turn("a") + " b", "rejected": turn("a")}, "pairs"),
    ("an empty response", {"instruction": "a", "input": "", "output": " \n"}, "demonstrations"),
    ("an empty response", {"messages": chat("a", "")}, "demonstrations"),
    ("chosen equals rejected", {"chosen": turn("a") + " b", "rejected": turn("a") + " b "}, "pairs"),
    ("chosen equals rejected", {"chosen": "same text", "rejected": "same text"}, "pairs"),
    ("the two sides have different prompts", {"chosen": turn("a") + " b", "rejected": turn("A") + " c"}, "pairs"),
    ("the two sides have different prompts", {"chosen": chat("a", "b"), "rejected": chat("c", "d")}, "pairs"),
    (
        "no answer at the end of the dialogue",
        {"chosen": turn("a") + " b\n\nHuman: c", "rejected": turn("a") + " d"},
        "pairs",
    ),
    ("no answer at the end of the dialogue", {"messages": chat("a", "b", "c")}, "demonstrations"),
    ("not labelled", {"data": TASK, "annotations": []}, "pairs"),
    ("not labelled", {"data": TASK, "annotations": [{**LABELLED["annotations"][0], "was_cancelled": True}]}, "pairs"),
]


@pytest.mark.parametrize(("reason", "row", "kind"), LEFT_OUT)
def test_what_says_nothing_is_counted_and_never_loaded(
    reason: str, row: dict, kind: data.Kind, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    whole = {
        "chosen": {"chosen": turn("x") + " y", "rejected": turn("x") + " z"},
        "instruction": {"instruction": "x", "input": "", "output": "y"},
        "messages": {"messages": chat("x", "y")},
        "data": {"data": TASK, **LABELLED},
    }[next(iter(row))]
    (tmp_path / "a").write_text(jsonl(row, whole, row))
    found = data.read(tmp_path / "a", kind)
    assert found.left_out == {reason: 2} and len(found.records) == 1 and not found.bad
    assert data.load(tmp_path / "a", kind) == found.records
    assert f"2 with {reason} left out" in capsys.readouterr().out
    (tmp_path / "b").write_text(jsonl(row))
    with pytest.raises(UserError, match=f"{reason} left out; nothing to learn from"):
        data.load(tmp_path / "b", kind)


def test_most_rows_decide_what_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "a").write_text(jsonl(pair("p:", " a", " b"), *(demonstration("p:", f" {i}") for i in range(3))))
    found = data.read(tmp_path / "a")
    assert (found.kind, len(found.records), len(found.bad)) == ("demonstrations", 3, 1)
    assert str(found.bad[0]).startswith(f"{tmp_path / 'a'}:1: no field 'response or ")
    (tmp_path / "b").write_text(jsonl(*(pair("p:", f" {i}", " b") for i in range(3)), demonstration("p:", " c")))
    found = data.read(tmp_path / "b")
    assert (found.kind, len(found.records)) == ("pairs", 3)
    assert [str(bad) for bad in found.bad] == [f"{tmp_path / 'b'}:4: no field 'chosen' in this record"]


def test_columns_give_fields_their_names(tmp_path: Path) -> None:
    (tmp_path / "a").write_text(jsonl({"query": "a", "good": "b", "bad": "c"}))
    names = ("question=query", "chosen=good", "rejected=bad")
    assert data.load(tmp_path / "a", "pairs", columns=names) == [pair(turn("a"), " b", " c")]
    (tmp_path / "c").write_text(jsonl(demonstration("a", " b")))
    assert data.load(tmp_path / "c", "demonstrations", columns=["question=prompt"]) == [demonstration(turn("a"), " b")]
    swapped = ("chosen=rejected", "rejected=chosen")
    (tmp_path / "b").write_text(jsonl(pair("a:", " b", " c")))
    assert data.load(tmp_path / "b", "pairs", columns=swapped) == [pair("a:", " c", " b")]


@pytest.mark.parametrize(
    ("split", "kept"),
    [
        ("", range(300)),
        ("[:3]", range(3)),
        ("[3:]", range(3, 300)),
        ("[20%:50%]", range(60, 150)),
        ("[298:999]", (298, 299)),
    ],
)
def test_slices_of_a_file(split: str, kept: Sequence[int], tmp_path: Path) -> None:
    (tmp_path / "a").write_text(jsonl(*({"prompt": f"p{i}"} for i in range(300))))
    assert [r["prompt"] for r in data.load(tmp_path / "a", "prompts", split=split)] == [f"p{i}" for i in kept]


def test_slices_of_a_text_meet_without_a_gap(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("".join(f"line {i}\n" for i in range(10)))
    parts = [data.load(tmp_path / "a", "demonstrations", split=split)[0]["response"] for split in ("[:70%]", "[70%:]")]
    assert "\n".join(parts) == "\n".join(f"line {i}" for i in range(10)) and parts[1].startswith("line 7")


@pytest.mark.parametrize(
    ("source", "split", "asked"),
    [
        ("a/b", "", {"split": "train", "streaming": False}),
        ("a/b/c", "test", {"data_dir": "c", "split": "test", "streaming": False}),
        ("a/b:main@v1", "[:50%]", {"name": "main", "revision": "v1", "split": "train[:50%]", "streaming": False}),
        ("a/b", "test[2:5]", {"split": "test", "streaming": True}),
    ],
)
def test_hub_names_are_loaded_through_datasets(
    source: str, split: str, asked: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    calls = []

    def load_dataset(path: str, name: str | None, **arguments: object) -> object:
        calls.append({"path": path, "name": name, **arguments})
        whole = datasets.Dataset.from_list([{"chosen": f"a {i}", "rejected": "b", "i": i} for i in range(9)])
        return whole.to_iterable_dataset() if arguments["streaming"] else whole

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    records = data.load(source, "pairs", split=split)
    assert calls == [{"path": "a/b", "name": None, "data_dir": None, "revision": None, **asked}]
    assert [r["chosen"] for r in records] == [f"a {i}" for i in (range(2, 5) if "[2:5]" in split else range(9))]


def test_without_a_network_a_hub_name_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(UserError, match="nobody/nothing: cannot be loaded from the Hugging Face hub .* or give a file"):
        data.load("nobody/nothing", "pairs")
    assert not data.is_hub_name("data/missing.jsonl") and not data.is_hub_name(tmp_path / "a" / "b")


@pytest.mark.parametrize(
    "first",
    ["prompt,response", '"prompt","response"', "id;text;label\r", '"review text",label', "prompt,chosen,rejected"],
)
def test_csv_is_refused_in_words(first: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(f'{first}\n"a, b",c\n'.encode())
    for kind in (None, "pairs", "demonstrations"):
        with pytest.raises(UserError, match="a:1: looks like CSV, which is not read; save it as TSV or JSON Lines"):
            data.read(tmp_path / "a", kind)
    (tmp_path / "a").write_text('Hello, world\n"Yes," she said.\n')
    assert len(data.load(tmp_path / "a", "demonstrations")) == 1


# Rows of public data sets as the hub gives them, by name: (rows, kind, first record, records).
POST = "SUBREDDIT: r/x\n\nTITLE: T\n\nPOST: P\n\nTL;DR:"
HUB_SETS: dict[str, tuple[list[dict[str, Any]], data.Kind, dict[str, Any]]] = {
    "Anthropic/hh-rlhf": (
        [{"chosen": HH + " Yes.", "rejected": HH + " No."}],
        "pairs",
        pair(HH, " Yes.", " No."),
    ),
    "stanfordnlp/imdb": (
        [{"text": "I liked it.<br />A lot.", "label": 0}, {"text": "No.", "label": 1}],
        "demonstrations",
        {**demonstration("", "I liked it.<br />A lot."), "rating": 0.0},
    ),
    "trl-lib/tldr": ([{"prompt": POST, "completion": " Short."}], "demonstrations", demonstration(POST, " Short.")),
    "trl-lib/tldr-preference": (
        [{"prompt": POST, "chosen": " Short.", "rejected": " Very long."}],
        "pairs",
        pair(POST, " Short.", " Very long."),
    ),
}


@pytest.mark.parametrize("name", HUB_SETS)
def test_public_sets_by_hub_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with the columns of the four sets in docs/using.md."""
    import datasets

    rows, kind, record = HUB_SETS[name]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    found = data.read(name)
    assert (found.kind, found.records[0], len(found.records)) == (kind, record, len(rows)) and not found.left_out
    assert data.load(name, "demonstrations")[0]["response"] == record.get("response", record.get("chosen"))


# ---------------------------------------------------------------------------------------------------- any text at all
any_text = st.lists(
    st.sampled_from(
        ["<|endoftext|>", "\x00", "\u2028", "\u0085", "\ufeff", "\n\nHuman:", "\n", "\t", "é", "😀", '"', "a", " "]
    )
).map("".join) | st.text(st.characters(exclude_categories=["Cs"]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(prompt=any_text, response=any_text)
def test_any_text_goes_through_and_never_gives_eos(
    prompt: str, response: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("any") / "a"
    write_records(file, [{"prompt": "x:" + prompt, "response": " y" + response}])
    (record,) = data.load(file, "demonstrations")
    (example,) = encode_demonstrations(BYTES, [record], max_length=4096)
    ids = example.prompt_ids + example.response_ids
    assert ids.count(BYTES.eot_token) == 1 and ids[-1] == BYTES.eot_token
    assert tokenizer.decode(BYTES, ids[:-1]) == record["prompt"] + record["response"]


# --------------------------------------------------------------------------------------------------- the check command
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # the other tests have imported it
def test_check_names_every_bad_line_and_exits_with_2(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(jsonl(pair("p:", " good", " bad")) + "{oops\n" + jsonl({"prompt": "p", "chosen": "x"}))
    for arguments in ((), ("check", str(file), "--tokenizer", "bytes", "--max-length", "8")):
        monkeypatch.setattr(sys, "argv", ["data", *arguments])
        with pytest.raises(SystemExit) as stop:
            runpy.run_module("minirlhf.data", run_name="__main__", alter_sys=True)
        assert stop.value.code == 2
        out, errors = capsys.readouterr()
    assert f"{file}:2: not JSON" in out and f"{file}:3: no field 'rejected'" in out
    assert errors == f"error: {file}: bad lines: 2; correct or remove them\n"


def test_check_stops_quietly_where_its_reader_does(tmp_path: Path) -> None:
    """`check FILE | head -1`: the pipe is closed long before the report ends."""
    file = tmp_path / "a.jsonl"
    file.write_text("{oops\n" * 20_000)  # more than a pipe holds
    command = f"{sys.executable} -m minirlhf.data check {file} --tokenizer bytes | head -1"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment, timeout=60)
    assert done.stdout == f"{file}\n" and "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_check_shows_the_loss_mask_and_what_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "a.jsonl"
    rows = [pair("p\n:", " good", " bad"), pair("p" * 9 + ":", " good", " bad"), pair("p:", " " + "x" * 99, " b")]
    file.write_text(jsonl(*rows, pair("p:", " b", " b")))
    check.main(check.Config(source=str(file), tokenizer="bytes", max_length=12))
    out = capsys.readouterr().out
    assert "JSON Lines; preference pairs; 4 rows" in out and "3 pairs to learn from" in out
    assert "1 left out: chosen equals rejected" in out
    assert (
        "chosen   no loss     3 tokens |p\\n:|" in out and "chosen   loss        6 tokens | good<|endoftext|>|" in out
    )
    assert "rejected loss        5 tokens | bad<|endoftext|>|" in out
    # Bytes: prompts 3, 10, 2; chosen with EOS 6, 6, 101. 10 + 6 is 4 more than 12; 101 do not fit at all.
    assert "chosen          6       6      82      99     101" in out
    assert "in 12 tokens: 1 left out" in out and "1 lose the start of their prompt, at most 4 tokens" in out


# ------------------------------------------------------------------------------------------------------ the real files
EMPTY, SAME, OTHER = "an empty response", "chosen equals rejected", "the two sides have different prompts"
REAL = {
    "preference/hh-helpful-base.train.jsonl.gz": ("JSON Lines, gzip", "pairs", 1400, {EMPTY: 2, OTHER: 6}),
    "preference/hh-helpful-base.test.jsonl.gz": ("JSON Lines, gzip", "pairs", 200, {EMPTY: 1}),
    "preference/hh-harmless-base.train.jsonl.gz": ("JSON Lines, gzip", "pairs", 1300, {EMPTY: 1, OTHER: 5}),
    "preference/hh-harmless-base.test.jsonl.gz": ("JSON Lines, gzip", "pairs", 200, {EMPTY: 1}),
    "preference/polite-instructions.json": ("JSON array", "pairs", 890, {SAME: 5}),
    "sft/small-instructions.json": ("JSON array", "demonstrations", 890, {}),
    "sft/self-instruct-seed-tasks.jsonl": ("JSON Lines", "demonstrations", 175, {}),
    "sft/gsm8k.train.jsonl.gz": ("JSON Lines, gzip", "demonstrations", 3000, {}),
    "prompts/oasst-en-prompts.jsonl": ("JSON Lines", "prompts", 250, {}),
    "sentiment/movie-snippets-rated.tsv": ("TSV", "demonstrations", 8000, {}),
    "sentiment/uci-imdb_labelled.txt": ("TSV", "demonstrations", 1000, {}),
    "sentiment/uci-yelp_labelled.txt": ("TSV", "demonstrations", 1000, {}),
    "sentiment/vader_lexicon.txt": ("TSV", "demonstrations", 7520, {}),
    "sentiment/uci-readme.txt": ("plain text", "demonstrations", 1, {}),
    "text/tinyshakespeare.txt": ("plain text", "demonstrations", 1, {}),
    "text/the-verdict.txt": ("plain text", "demonstrations", 1, {}),
    "text/wikitext-2.valid.txt": ("plain text", "demonstrations", 1, {}),
    "text/tinystories.jsonl.gz": ("JSON Lines, gzip", "demonstrations", 10576, {}),
    "text/tinystories-sampled-1.jsonl.gz": ("JSON Lines, gzip", "demonstrations", 15028, {}),
    "text/tinystories-sampled-2.jsonl.gz": ("JSON Lines, gzip", "demonstrations", 13893, {}),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files(name: str, real_data: Path) -> None:
    container, kind, total, left_out = REAL[name]
    found = data.read(real_data / name)
    assert (found.container, found.kind, found.left_out, found.bad) == (container, kind, left_out, [])
    assert len(found.records) == total - sum(left_out.values())
    for record in found.records:
        assert all(record[field].strip() for field in ("response", "chosen", "rejected") if field in record)
        assert "chosen" not in record or record["chosen"].strip() != record["rejected"].strip()
        assert not record["prompt"] or (
            record["prompt"].startswith("\n\nHuman:") and record["prompt"][-12:] == "\n\nAssistant:"
        )


def test_every_other_real_file_is_read_or_refused_in_one_line(real_data: Path) -> None:
    # The folder grows: a file that REAL does not name must not pass for something it is not, nor end in a traceback.
    folders = ("preference", "prompts", "sentiment", "sft", "text")
    there = {path.relative_to(real_data).as_posix() for name in folders for path in (real_data / name).iterdir()}
    assert set(REAL) <= there
    for name in sorted(there - set(REAL)):
        try:
            found = data.read(real_data / name)
        except UserError as error:
            assert str(error).startswith(f"{real_data / name}") and "\n" not in str(error)
        else:
            assert found.records and not found.bad


@pytest.mark.parametrize("name", ["scratchplot-endings.tsv", "scratchplot-ratings.tsv"])
def test_a_table_of_unknown_columns_is_refused_by_their_names(name: str, real_data: Path) -> None:
    # People's votes and ratings of whole stories: no column is a prompt or a response.
    with pytest.raises(UserError, match=r"nothing can be read from the fields story.*rater; name the fields"):
        data.read(real_data / "preference" / name)


def test_real_dialogues_keep_every_character_of_prompt_and_answer(real_data: Path) -> None:
    path = real_data / "preference" / "hh-helpful-base.train.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    whole = {(row["chosen"].rstrip(), row["rejected"].rstrip()) for row in rows}
    for record in data.load(path, "pairs"):
        assert (record["prompt"] + record["chosen"], record["prompt"] + record["rejected"]) in whole


def test_real_ratings_and_texts(real_data: Path) -> None:
    snippets = data.load(real_data / "sentiment" / "movie-snippets-rated.tsv", "demonstrations")
    assert all(-4 <= record["rating"] <= 4 for record in snippets) and snippets[1]["rating"] == 1.46666666667
    assert snippets[1]["response"].startswith("If you sometimes like to go to the movies")
    reviews = data.load(real_data / "sentiment" / "uci-imdb_labelled.txt", "demonstrations")
    assert Counter(record["rating"] for record in reviews) == {0.0: 500, 1.0: 500}
    path = real_data / "text" / "tinyshakespeare.txt"
    (text,) = data.load(path, "demonstrations")
    assert text["response"] + "\n" == path.read_text(encoding="utf-8")
    rows = encode_demonstration(BYTES, text, max_length=1000)
    ids = [token for row in rows for token in row.response_ids]
    assert bytes(ids[:-1]) == text["response"].encode() and ids[-1] == BYTES.eot_token
    assert all(rows[i].prompt_ids == [rows[i - 1].response_ids[-1]] for i in range(1, len(rows)))


def test_the_worlds_files_read_as_they_are() -> None:
    for path in sorted((ROOT / "data" / "world").glob("*.jsonl")):
        kind: data.Kind = "prompts" if path.name.startswith("prompts") else "demonstrations"
        lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
        assert data.load(path, kind) == [json.loads(line) for line in lines]


# ------------------------------------------------------------------------------------------------------------- one flag
def test_each_stage_trains_on_a_users_file_with_one_flag(tmp_path: Path) -> None:
    alpaca = [{"instruction": f"Say {i}", "input": "", "output": f"It is {i}."} for i in range(40)]
    hh = [{"chosen": turn(f"q{i}") + " Yes.", "rejected": turn(f"q{i}") + " No."} for i in range(40)]
    export = [{"id": i, "data": {**TASK, "prompt": f"q{i}?"}, **LABELLED} for i in range(40)]
    for name, rows in (("alpaca", alpaca), ("hh", hh), ("export", export)):
        (tmp_path / name).write_text(jsonl(*rows) if name == "hh" else json.dumps(rows))
    small = {"run": tmp_path / "run", "device": "cpu"}
    train_sft.main(train_sft.Config(**small, train=str(tmp_path / "alpaca"), n_layer=1, n_embd=16, epochs=1))
    train_reward.main(train_reward.Config(**small, comparisons=str(tmp_path / "hh"), reference_samples=20))
    train_dpo.main(train_dpo.Config(**small, comparisons=str(tmp_path / "export")))
    train_ppo.main(train_ppo.Config(**small, prompts=str(tmp_path / "hh"), iterations=1, rollout_size=4))
    for stage, file in (("sft", "alpaca"), ("reward", "hh"), ("dpo", "export"), ("ppo", "hh")):
        run = json.loads((tmp_path / "run" / stage / "run.json").read_text())
        assert list(run["inputs"]) == [str(tmp_path / file)]  # and no file of the world
        assert f"- {file}, SHA-256" in (tmp_path / "run" / stage / "model" / "README.md").read_text()


def test_held_out_demonstrations(tmp_path: Path) -> None:
    (tmp_path / "a").write_text(jsonl(*(demonstration(f"p{i}:", " r") for i in range(20))))
    (tmp_path / "b").write_text(jsonl(*(demonstration(f"v{i}:", " r") for i in range(4))))
    train, held_out = train_sft.read_records(train_sft.Config(train=str(tmp_path / "a"), split="[:10]"))
    assert len(train) == 9 and len(held_out) == 1 and held_out[0] not in train
    config = train_sft.Config(train=str(tmp_path / "a"), validation=str(tmp_path / "b"), validation_split="[1:]")
    assert [[r["prompt"] for r in side] for side in train_sft.read_records(config)] == [
        [f"p{i}:" for i in range(20)],
        ["v1:", "v2:", "v3:"],
    ]
    with pytest.raises(UserError, match="--validation-split"):
        train_sft.read_records(train_sft.Config(train=str(tmp_path / "a"), validation_split="[1:]"))
    world = train_sft.held_out_source(train_sft.Config())
    assert Path(world).name == "demonstrations.validation.jsonl"


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text(jsonl(*(demonstration(f"p{i}:", " r") for i in range(20))))
    GPT(GPTConfig(vocab_size=11, n_positions=8, n_layer=1, n_head=1, n_embd=4)).save_pretrained(tmp_path / "model")
    config = train_sft.Config(
        run=tmp_path / "run", train=str(tmp_path / "a"), model=str(tmp_path / "model"), tokenizer="bytes"
    )
    with pytest.raises(UserError, match="'bytes' has 257 ids, the model a vocabulary of 11"):
        train_sft.main(config)
