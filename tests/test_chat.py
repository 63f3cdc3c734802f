"""The chat, with scripted input: what the models are asked, what is shown of their replies, and what stops them."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from test_generate import EOS, lively, responses, some_prompts

from minirlhf import chat, tokenizer
from minirlhf.encode import encode_prompt
from minirlhf.generate import generate, stream
from minirlhf.model import GPT, GPTConfig
from minirlhf.reward import RewardModel
from minirlhf.runtime import DivergenceError, Interrupted, Stream, UserError, interruptible
from minirlhf.tokenizer import response_text

ENCODING = tiny.ENCODING
LIMIT = 6


@pytest.fixture(scope="module")
def run() -> Path:
    return tiny.finished_run()


def config(run: Path, *stages: str, **changes: object) -> chat.Config:
    models = tuple(str(run / stage / "model") for stage in stages or ("sft",))
    return chat.Config(**{"models": models, "max_new_tokens": LIMIT, "device": "cpu", **changes})


def talk(monkeypatch: pytest.MonkeyPatch, settings: chat.Config, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    chat.main(settings)


def expected(folder: Path, prompt: str, number: int, **settings: object) -> str:
    """The reply to question `number`, from `generate`."""
    settings = {"temperature": 1.0, "seed": 0, "max_new_tokens": LIMIT, **settings}
    ids = encode_prompt(ENCODING, prompt)
    keys = [(Stream.CHAT, number)]
    samples = generate(GPT.from_pretrained(folder), [ids], eos_id=tiny.EOS, keys=keys, **settings)
    return response_text(ENCODING, samples.response_ids()[0])


# ------------------------------------------------------------------------------------------------------ token by token
@pytest.mark.parametrize("eos_id", [EOS, None])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
def test_a_stream_gives_the_tokens_of_generate(temperature: float, eos_id: int | None) -> None:
    model, prompts = lively(), some_prompts(12)
    settings = {"max_new_tokens": 8, "eos_id": eos_id, "temperature": temperature, "seed": 4}
    keys = [(2, row) for row in range(12)]
    whole = [
        responses(generate(model, [prompt], keys=[key], **settings))[0]
        for prompt, key in zip(prompts, keys, strict=True)
    ]
    assert whole == [list(stream(model, p, key=key, **settings)) for p, key in zip(prompts, keys, strict=True)]
    assert None in (eos_id, temperature or None) or len({len(row) for row in whole}) > 1, "some end early"


def test_a_stream_computes_no_token_that_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively()
    calls = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda tokens, cache: calls.append(tokens.shape) or hidden(tokens, cache))
    tokens = stream(model, [1, 2, 3], max_new_tokens=5, eos_id=None)
    assert not calls
    next(tokens), next(tokens)
    assert calls == [(1, 3), (1, 1)]
    assert len(list(tokens)) == 3
    assert calls == [(1, 3), (1, 1), (1, 1), (1, 1), (1, 1)], "the last token is not fed back"


def test_a_stream_refuses_what_generate_refuses() -> None:
    with pytest.raises(UserError, match="exceeds the model's n_positions 24"):
        next(stream(lively(), [1] * 20, max_new_tokens=6, eos_id=EOS))
    broken = lively()
    with torch.no_grad():
        broken.ln_f.bias[0] = float("nan")
    with pytest.raises(DivergenceError, match="not finite"):
        next(stream(broken, [1], max_new_tokens=6, eos_id=EOS))


# ------------------------------------------------------------------------------------------------------------- a reply
def test_a_character_of_several_tokens_is_shown_when_it_is_whole() -> None:
    encoding = tokenizer.load("bytes")
    reply, shown = chat.Reply(encoding), []
    for byte in " né".encode():
        reply.add(byte)
        shown.append(reply.shown)
    assert shown == ["", "n", "n", "né"]
    reply.add(0xE2)
    reply.end()
    assert reply.text == " né\ufffd", "half a character at the end of the reply"
    assert not reply.finished


def test_a_reply_ends_where_the_model_speaks_for_the_human() -> None:
    encoding = tokenizer.load("bytes")
    reply, seen = chat.Reply(encoding), []
    for byte in b" Yes.\n\nHum and more\n\nHuman:":
        reply.add(byte)
        seen.append(reply.shown)
    assert reply.finished and reply.text == " Yes.\n\nHum and more"
    assert reply.ids == [*b" Yes.\n\nHum and more", encoding.eot_token]
    assert seen[-1] == "Yes.\n\nHum and more"
    assert all(seen[-1].startswith(text) for text in seen), "nothing that was shown is taken back"


def test_what_was_held_back_is_shown_at_the_end() -> None:
    reply = chat.Reply(tokenizer.load("bytes"))
    for byte in b"a\n\nHum":
        reply.add(byte)
    assert reply.shown == "a"
    reply.end()
    assert reply.shown == "a\n\nHum"


def test_a_reply_cannot_steer_the_terminal() -> None:
    reply = chat.Reply(tokenizer.load("bytes"))
    for byte in b"\x1b[2Jx":
        reply.add(byte)
    assert reply.shown == "\ufffd[2Jx"


# --------------------------------------------------------------------------------------------------- through a pipe
def test_each_line_is_a_question_after_all_that_was_said(run: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    folder = run / "sft" / "model"
    talk(monkeypatch, config(run), "Is the bear brown?", "  ", "And the crab?")
    first = "\n\nHuman: Is the bear brown?\n\nAssistant:"
    one = expected(folder, first, 0)
    two = expected(folder, f"{first} {one.strip()}\n\nHuman: And the crab?\n\nAssistant:", 1)
    assert capsys.readouterr().out == f"{one.lstrip()}\n{two.lstrip()}\n"


def test_turns_0_asks_every_question_by_itself(run: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    talk(monkeypatch, config(run, turns=0, seed=5), "Is the bear brown?", "And the crab?")
    second = expected(run / "sft" / "model", "\n\nHuman: And the crab?\n\nAssistant:", 1, seed=5)
    assert capsys.readouterr().out.splitlines()[-1] == second.lstrip().splitlines()[-1]


def prompts_asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], float]]:
    """Lets the models be asked, and keeps the prompts' ids and the temperatures."""
    asked = []

    def watched(model: GPT, prompt: list[int], **settings: object) -> Iterator[int]:
        asked.append((list(prompt), settings["temperature"]))
        return stream(model, prompt, **settings)

    monkeypatch.setattr(chat, "stream", watched)
    return asked


def test_a_long_dialogue_loses_its_start(run: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    asked = prompts_asked(monkeypatch)
    questions = [f"Does the bear like the {animal}, and what colour is it?" for animal in ("crab", "deer", "seal")]
    talk(monkeypatch, config(run, max_new_tokens=60), *questions)
    replies = [line for line in capsys.readouterr().err.splitlines() if "loses its start" in line]
    assert len(replies) == 1, "said once"
    lengths = [len(prompt) for prompt, _ in asked]
    assert max(lengths) == lengths[-1] == 96 - 60
    end = encode_prompt(ENCODING, f"\n\nHuman: {questions[-1]}\n\nAssistant:")
    assert asked[-1][0][-len(end) :] == end, "the question itself stays"


def test_kept_turns_are_the_last_ones() -> None:
    turns = [(f"\n\n{who}:", f"{who[0]}{n}") for n in range(3) for who in ("Human", "Assistant")]
    speaker = chat.Speaker("m", None, ENCODING, LIMIT, turns)
    last = "\n\nHuman: H2\n\nAssistant: A2"
    assert speaker.prompt("q", 1) == f"{last}\n\nHuman: q\n\nAssistant:"
    assert speaker.prompt("q", 0) == "\n\nHuman: q\n\nAssistant:"
    assert speaker.prompt("q", 9) == speaker.prompt("q", None)
    assert speaker.prompt("q", None).startswith("\n\nHuman: H0")


def test_commands(run: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    asked = prompts_asked(monkeypatch)
    lines = ("one", "/temp 0", "two", "/reset", "/temp -1", "/temp hot", "/temp", "/dance", "three", "/quit", "four")
    talk(monkeypatch, config(run, temperature=0.5), *lines)
    assert [temperature for _, temperature in asked] == [0.5, 0.0, 0.0]
    assert asked[2][0] == encode_prompt(ENCODING, "\n\nHuman: three\n\nAssistant:"), "the dialogue was forgotten"
    assert len(asked[1][0]) > len(asked[2][0])
    said = capsys.readouterr().err
    for words in ("a new dialogue", "/temp -1: must be a number", "/temp hot: must be a number", "/dance: no such"):
        assert words in said
    assert said.count("temperature 0\n") == 2


@pytest.mark.parametrize("limit", [2, 20])  # the short replies are cut off: their ids have no EOS to be scored at
def test_two_models_hear_the_same_question_and_are_scored(
    limit: int, run: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    question = "Is the bear brown?"
    settings = config(run, "sft", "dpo", reward_model=str(run / "reward" / "model"), max_new_tokens=limit)
    talk(monkeypatch, settings, question)
    prompt = f"\n\nHuman: {question}\n\nAssistant:"
    ids = encode_prompt(ENCODING, prompt)
    reward_model = RewardModel.from_pretrained(run / "reward" / "model")
    shown, scores = [], []
    for stage in ("sft", "dpo"):
        text = expected(run / stage / "model", prompt, 0, max_new_tokens=limit)
        model = GPT.from_pretrained(run / stage / "model")
        samples = generate(model, [ids], max_new_tokens=limit, eos_id=tiny.EOS, keys=[(Stream.CHAT, 0)])
        score = reward_model(samples.tokens, samples.lengths).item()
        shown.append(f"{stage}: {text.lstrip()}")
        scores.append(f"[{stage}: reward {score:.2f}]")
    assert capsys.readouterr().out == "\n".join([*shown, *scores]) + "\n"


# ------------------------------------------------------------------------------------------------------------- Ctrl-C
def press_during(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C arrives while the token after the first `count` of the first question is computed."""
    asked = []

    def interrupted(model: GPT, prompt: list[int], **settings: object) -> Iterator[int]:
        asked.append(prompt)
        first = len(asked) == 1
        for number in range(50):
            if first and number == count:
                signal.raise_signal(signal.SIGINT)
            yield tokenizer.encode(ENCODING, " bear")[0]
        yield tiny.EOS

    monkeypatch.setattr(chat, "stream", interrupted)


def test_ctrl_c_stops_the_reply_and_not_the_program(run: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    press_during(3, monkeypatch)
    word = ENCODING.decode([tokenizer.encode(ENCODING, " bear")[0]]).strip()
    with interruptible():  # as the command is run
        talk(monkeypatch, config(run), "one", "two")
        handler = signal.getsignal(signal.SIGINT)
        with pytest.raises(Interrupted):
            handler(signal.SIGINT, None)
    out, said = capsys.readouterr()
    first, second = out.splitlines()
    assert first.count(word) == 4 and second.count(word) == 50
    assert "[sft: cut off after 4 tokens]" in said


# --------------------------------------------------------------------------------------------------------- a terminal
def on_terminal(monkeypatch: pytest.MonkeyPatch, keys: bytes, settings: chat.Config) -> str:
    """All that a pseudo-terminal of 100 columns shows; the keys are pressed at its other end, by another thread."""
    leader, follower = pty.openpty()
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "30")
    shown = []

    def user() -> None:
        os.write(leader, keys)
        with contextlib.suppress(OSError):  # Linux's way to say that the other end is closed
            while chunk := os.read(leader, 1 << 16):
                shown.append(chunk)

    typist = threading.Thread(target=user)
    with os.fdopen(follower, "r") as keyboard, os.fdopen(os.dup(follower), "w") as screen, monkeypatch.context() as m:
        for name, file in (("stdin", keyboard), ("stdout", screen), ("stderr", screen)):
            m.setattr(sys, name, file)
        typist.start()
        chat.main(settings)
    typist.join()
    os.close(leader)
    return b"".join(shown).decode()


def test_at_a_terminal_two_replies_stand_side_by_side(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = on_terminal(monkeypatch, b"hello\n/quit\n", config(run, "sft", "ppo"))
    prompt = "\n\nHuman: hello\n\nAssistant:"
    left, right = (" ".join(expected(run / s / "model", prompt, 0).split()) for s in ("sft", "ppo"))
    rows = [line.split("|") for line in shown.replace("\x1b[K", "").replace("\x1b[1A", "").split("\r\n") if "|" in line]
    assert [cell.split("\r")[-1].strip() for cell in rows[0]] == ["[sft]", "[ppo]"]
    assert " ".join(rows[-1][0].split()) == left and " ".join(rows[-1][1].split()) == right
    assert "\x1b[1A" in shown, "the line is drawn again as it grows"


def test_ctrl_c_at_the_prompt_drops_the_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([KeyboardInterrupt(), "hello", EOFError()])

    def typed_line(prompt: str) -> str:
        answer = next(answers)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr("builtins.input", typed_line)
    assert list(chat.typed()) == ["hello"]


def test_lines_are_drawn_again_from_the_first_that_changed(capsys) -> None:
    assert chat.redraw([], ["a", "b"], 9) == ["a", "b"]
    chat.redraw(["a", "b"], ["a", "bc", "d"], 9)
    assert capsys.readouterr().out == "\r\x1b[Ka\n\r\x1b[Kb\n" + "\x1b[1A\r\x1b[Kbc\n\r\x1b[Kd\n"
    chat.redraw(["x"] * 9, ["y"] * 9, 4)
    assert capsys.readouterr().out == "\x1b[3A" + "\r\x1b[Ky\n" * 3, "no further up than the screen goes"


# ------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    "change, words",
    [
        ({"models": ()}, "name one model or two"),
        ({"models": ("a", "b", "c")}, "name one model or two"),
        ({"models": ("./nothing here",)}, "no such folder"),
        ({"max_new_tokens": 96}, "--max-new-tokens 96: the context of .*, 96 tokens, leaves no room for a prompt"),
        ({"reward_model": "{other}"}, "--reward-model .*: has not the tokenizer of"),
        ({"models": ("{other}", "{misfit}")}, "the model a vocabulary of 7"),
    ],
)
def test_mistakes_are_named_before_weights_are_read(
    change: dict, words: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in (("other", 257), ("misfit", 7)):
        shape = GPTConfig(vocab_size=size, n_positions=96, n_layer=1, n_head=1, n_embd=4)
        GPT(shape).save_pretrained(tmp_path / name)
        tokenizer.save(tokenizer.load("bytes"), tmp_path / name)

    def fill(value: object) -> object:
        named = {name: str(tmp_path / name) for name in ("other", "misfit")}
        return value.format(**named) if isinstance(value, str) else value

    change = {k: tuple(map(fill, v)) if isinstance(v, tuple) else fill(v) for k, v in change.items()}
    monkeypatch.setattr(GPT, "from_pretrained", lambda folder: pytest.fail("weights were read"))
    with pytest.raises(UserError, match=words):
        chat.main(config(run, **change))


def test_names_tell_the_models_apart() -> None:
    assert chat.names_of(["runs/a/sft/model", "runs/a/ppo/model"]) == ["sft", "ppo"]
    assert chat.names_of(["gpt2", "runs/a/ppo/model/"]) == ["gpt2", "ppo"]
    assert chat.names_of(["runs/a/ppo/model", "runs/b/ppo/model"]) == ["1 runs/a/ppo/model", "2 runs/b/ppo/model"]
