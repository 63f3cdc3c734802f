"""Talk to a model, or to two models side by side.

    python -m minirlhf.chat runs/tiny/ppo/model
    python -m minirlhf.chat runs/tiny/sft/model runs/tiny/ppo/model --reward-model runs/tiny/reward/model --turns 0
    printf 'What does the bear eat?\\n' | python -m minirlhf.chat runs/tiny/ppo/model

The dialogue is the plain text that all stages train on, "\\n\\nHuman: …\\n\\nAssistant: …". Two models hear the same
questions, each after its own answers, and draw the same random numbers. A dialogue that is longer than the context
loses its start. Ctrl-C stops a reply, not the program. Commands: /temp 0.7, /reset, /quit.
From a pipe every line is a question; replies and scores go to standard output, everything else to standard error.
The world's models learned from single questions: ask them with --turns 0.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Literal

import tyro

from minirlhf import tokenizer
from minirlhf.config import Count, NotNegative, Seed, Settings, Steps, run_script
from minirlhf.dialogue import HELP, Chat, Round, Speaker, ctrl_c, say
from minirlhf.feedback.terminal import NARROW, wrap
from minirlhf.hf.hub import model_folder
from minirlhf.model import GPT, GPTConfig, read_config
from minirlhf.reward import RewardModel
from minirlhf.runtime import require, resolve_device

LONGEST = 256  # tokens of a reply where the context has room for more


@dataclass
class Config(Settings):
    models: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """One model or two: folders, or names on the hub."""
    reward_model: str | None = None
    """Folder or hub name of a reward model that scores every reply."""
    temperature: NotNegative = 1.0
    """Sample from softmax(logits / temperature); 0 takes the most likely token. /temp changes it."""
    max_new_tokens: Count | None = None
    """Length limit of a reply in tokens; by default half of the model's context, at most 256."""
    turns: Steps | None = None
    """Earlier questions and answers that stay before a question; by default all that fit, 0 asks each by itself."""
    seed: Seed = 0
    """Seed of the replies; question number n draws the same random numbers in every dialogue."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto takes a GPU where there is one."""


PRESETS = {"chat": Config()}


# ------------------------------------------------------------------------------------------------------------- showing
def one_by_one(turn: Round) -> None:
    """Each reply as it is written, one below the other."""
    for number, (name, reply) in enumerate(zip(turn.names, turn.replies, strict=True)):
        written, going = 0, True
        print(f"{name}: " if len(turn.names) > 1 else "", end="", flush=True)
        while going:
            going = turn.advance(number)
            print(reply.shown[written:], end="", flush=True)
            written = len(reply.shown)
        print(flush=True)


def side_by_side(turn: Round) -> None:
    """Two replies in two columns of a terminal, a token of each in turn."""
    size = shutil.get_terminal_size()
    width = (size.columns - 5) // 2
    lines: list[str] = []
    going = True
    while going:
        going = any([turn.advance(number) for number in range(2)])
        texts = zip(turn.names, turn.replies, strict=True)
        sides = [[f"[{name}]", *wrap(reply.shown, width)] for name, reply in texts]
        rows = [f"{a:<{width}}  |  {b}".rstrip() for a, b in zip_longest(*sides, fillvalue="")]
        lines = redraw(lines, rows, size.lines)


def redraw(before: Sequence[str], lines: list[str], height: int) -> list[str]:
    """Replace what changed of the lines that were drawn last; what has left the screen of `height` stays as it is."""
    same = next((i for i, (a, b) in enumerate(zip(before, lines, strict=False)) if a != b), len(before))
    same = max(same, len(before) - height + 1)
    up = len(before) - same
    sys.stdout.write((f"\x1b[{up}A" if up else "") + "".join(f"\r\x1b[K{line}\n" for line in lines[same:]))
    sys.stdout.flush()
    return lines


# ------------------------------------------------------------------------------------------------------------- asking
def typed() -> Iterator[str]:
    """Lines that are typed at a terminal until Ctrl-D; Ctrl-C drops the line that is being typed."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history for input(); not on every system
    while True:
        try:
            with ctrl_c(signal.default_int_handler):
                line = input("\nyou: ")
        except KeyboardInterrupt:
            say("\n/quit or Ctrl-D leaves")
            continue
        except EOFError:
            print()
            return
        yield line


def open_chat(config: Config) -> Chat:
    """Read the models; raises UserError where they cannot talk, before any weights are read."""
    require(0 < len(config.models) < 3, "chat: name one model or two, as in: python -m minirlhf.chat MODEL [MODEL]")
    device = resolve_device(config.device)
    folders = [model_folder(source) for source in config.models]
    shapes = [read_config(folder) for folder in folders]
    encodings = [tokenizer.load(folder) for folder in folders]
    limits = [reply_limit(config, shape, folder) for shape, folder in zip(shapes, folders, strict=True)]
    for encoding, shape, folder in zip(encodings, shapes, folders, strict=True):
        tokenizer.check_fits(encoding, shape.vocab_size, folder)
    reward_folder = model_folder(config.reward_model) if config.reward_model else None
    if reward_folder:
        read_config(reward_folder)
        own = tokenizer.load(reward_folder)
        for encoding, folder in zip(encodings, folders, strict=True):
            same = tokenizer.same_ids(own, encoding)
            require(same, f"--reward-model {reward_folder}: has not the tokenizer of {folder}")
    models = [GPT.from_pretrained(folder).to(device).eval().requires_grad_(False) for folder in folders]
    rows = zip(names_of(config.models), models, encodings, limits, strict=True)
    reward_model = RewardModel.from_pretrained(reward_folder).to(device).eval() if reward_folder else None
    return Chat([Speaker(*row) for row in rows], reward_model, config.turns, config.temperature, config.seed)


def reply_limit(config: Config, shape: GPTConfig, folder: Path) -> int:
    """Tokens of a reply, so that the context keeps room for a prompt."""
    limit = config.max_new_tokens or max(1, min(LONGEST, shape.n_positions // 2))
    room = f"--max-new-tokens {limit}: the context of {folder}, {shape.n_positions} tokens, leaves no room for a prompt"
    require(limit < shape.n_positions, room)
    return limit


def names_of(sources: Sequence[str]) -> list[str]:
    """A short name for each model: its folder's, or its stage's for <stage>/model; as given where these are alike."""
    paths = [Path(source).absolute() for source in sources]
    short = [path.parent.name if path.name == "model" else path.name for path in paths]
    return short if len(set(short)) == len(short) else [f"{number} {s}" for number, s in enumerate(sources, 1)]


def main(config: Config) -> None:
    """Talk until the end of the input or /quit."""
    for file in (sys.stdin, sys.stdout):
        if hasattr(file, "reconfigure"):
            file.reconfigure(errors="replace")  # a letter that the terminal does not know ends no dialogue
    chat = open_chat(config)
    by_hand = sys.stdin.isatty()
    columns = len(chat.speakers) == 2 and sys.stdout.isatty() and shutil.get_terminal_size().columns >= NARROW
    if by_hand:
        say(f"{' and '.join(speaker.name for speaker in chat.speakers)}; {HELP}; Ctrl-C stops a reply")
    for line in map(str.strip, typed() if by_hand else sys.stdin):
        if line.startswith("/"):
            if not chat.command(line):
                break
        elif line:
            chat.ask(line, show=side_by_side if columns else one_by_one)


def run_into_a_pipe() -> None:
    """The command; a program that reads the replies, such as `head`, may stop before the end."""
    try:
        run_script(main, PRESETS)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where Python writes what is left at its exit


if __name__ == "__main__":
    run_into_a_pipe()
