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

import codecs
import contextlib
import math
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal

import tiktoken
import torch
import tyro

from minirlhf import tokenizer
from minirlhf.batch import pad
from minirlhf.config import Count, NotNegative, Seed, Settings, Steps, run_into_a_pipe
from minirlhf.data.formats import ASSISTANT, HUMAN, as_text
from minirlhf.encode import encode_example, encode_prompt, encode_response
from minirlhf.feedback.terminal import NARROW, printable, wrap
from minirlhf.generate import stream
from minirlhf.hf.hub import model_folder
from minirlhf.model import GPT, read_config
from minirlhf.reward import RewardModel
from minirlhf.runtime import Stream, require, resolve_device

HELP = "commands: /temp [T] shows or sets the temperature, /reset forgets the dialogue, /quit leaves"
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


# ----------------------------------------------------------------------------------------------------------- a dialogue
class Reply:
    """A reply while it is written: `ids` as sampled, `text` so far, and whether it ended by itself.

    It ends with EOS, or where the model begins the next question in the human's place; that beginning is not shown.
    """

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.ids: list[int] = []
        self.text, self.finished, self.more = "", False, True
        self._encoding = encoding
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a token may end within a character

    def add(self, token: int) -> None:
        """Take the next token."""
        self.ids.append(token)
        self.finished = token == self._encoding.eot_token
        if not self.finished:
            self.text += self._bytes.decode(self._encoding.decode_single_token_bytes(token))
        if HUMAN in self.text:
            self.text, self.finished = self.text[: self.text.index(HUMAN)], True
            self.ids = encode_response(self._encoding, self.text)

    def end(self) -> None:
        """No token follows: half a character becomes U+FFFD."""
        self.more = False
        self.text += self._bytes.decode(b"", final=True)

    def write(self, tokens: Iterator[int], pressed: list[int]) -> Iterator[str]:
        """The text to show, after each token and at the end; Ctrl-C, once it is in `pressed`, ends the reply."""
        while not self.finished and not pressed and (token := next(tokens, None)) is not None:
            self.add(token)
            yield self.shown
        self.end()
        yield self.shown

    @property
    def shown(self) -> str:
        """The text without what may still turn out to be the human's next turn."""
        longest = min(len(HUMAN) - 1, len(self.text)) if self.more else 0
        held = next((n for n in range(longest, 0, -1) if self.text.endswith(HUMAN[:n])), 0)
        return printable(self.text[: len(self.text) - held].lstrip())


@dataclass
class Speaker:
    """A model, its longest reply in tokens, and the dialogue as it went with this model."""

    name: str
    model: GPT
    encoding: tiktoken.Encoding
    limit: int
    turns: list[tuple[str, str]] = field(default_factory=list)

    def prompt(self, question: str, count: int | None) -> str:
        """The dialogue so far, `count` earlier turns of it, with the question at its end."""
        earlier = self.turns if count is None else self.turns[max(0, len(self.turns) - 2 * count) :]
        return as_text([*earlier, (HUMAN, question)]) + ASSISTANT


Show = Callable[[list[str], list[Iterator[str]]], None]  # draws the replies of the models of these names


class Chat:
    """All that a chat knows between two questions."""

    def __init__(self, config: Config) -> None:
        """Read the models; raises UserError where they cannot talk, before any weights are read."""
        require(0 < len(config.models) < 3, "chat: name one model or two, as in: python -m minirlhf.chat MODEL [MODEL]")
        device = resolve_device(config.device)
        folders = [model_folder(source) for source in config.models]
        shapes, encodings = [read_config(folder) for folder in folders], [tokenizer.load(folder) for folder in folders]
        limits = [config.max_new_tokens or max(1, min(LONGEST, shape.n_positions // 2)) for shape in shapes]
        reward_folder = model_folder(config.reward_model) if config.reward_model else None
        for folder, shape, encoding, limit in zip(folders, shapes, encodings, limits, strict=True):
            context = f"the context of {folder}, {shape.n_positions} tokens, leaves no room for a prompt"
            require(limit < shape.n_positions, f"--max-new-tokens {limit}: {context}")
            tokenizer.check_fits(encoding, shape.vocab_size, folder)
            if reward_folder:
                read_config(reward_folder)
                same = tokenizer.same_ids(tokenizer.load(reward_folder), encoding)
                require(same, f"--reward-model {reward_folder}: has not the tokenizer of {folder}")
        models = [GPT.from_pretrained(folder).to(device).eval().requires_grad_(False) for folder in folders]
        rows = zip(names_of(config.models), models, encodings, limits, strict=True)
        self.speakers = [Speaker(*row) for row in rows]
        self.reward_model = RewardModel.from_pretrained(reward_folder).to(device).eval() if reward_folder else None
        self.turns, self.temperature, self.seed = config.turns, config.temperature, config.seed
        self.questions = 0
        self.warned = False  # that the start of this dialogue no longer fits

    def ask(self, question: str, *, show: Show) -> None:
        """Every speaker replies; `show` draws the tokens and prints. Ctrl-C ends the replies where they are."""
        rounds = [(speaker, speaker.prompt(question, self.turns), Reply(speaker.encoding)) for speaker in self.speakers]
        pressed: list[int] = []
        with ctrl_c(lambda number, frame: pressed.append(number)):
            texts = [reply.write(self._stream(speaker, prompt), pressed) for speaker, prompt, reply in rounds]
            show([speaker.name for speaker in self.speakers], texts)
            for speaker, prompt, reply in rounds:
                speaker.turns += [(HUMAN, question), (ASSISTANT, reply.text)]
                if not reply.finished:
                    say(f"[{speaker.name}: cut off after {len(reply.ids)} tokens]")
                if self.reward_model is not None:
                    reward = score(self.reward_model, speaker, prompt, reply)
                    print(f"[{speaker.name}: reward {reward:.2f}]", flush=True)
        self.questions += 1

    def _stream(self, speaker: Speaker, prompt: str) -> Iterator[int]:
        ids = encode_prompt(speaker.encoding, prompt)
        room = speaker.model.config.n_positions - speaker.limit
        if len(ids) > room and not self.warned:
            say(f"{speaker.name}: the dialogue is longer than the context and loses its start; /reset begins a new one")
            self.warned = True
        return stream(
            speaker.model,
            ids[-room:],
            max_new_tokens=speaker.limit,
            eos_id=speaker.encoding.eot_token,
            temperature=self.temperature,
            seed=self.seed,
            key=(Stream.CHAT, self.questions),
        )

    def command(self, line: str) -> bool:
        """Obey a line that begins with "/"; False where it ends the chat."""
        name, _, value = line.partition(" ")
        if name == "/reset":
            for speaker in self.speakers:
                speaker.turns.clear()
            self.warned = False
            say("a new dialogue")
        elif name == "/temp":
            self._set_temperature(value.strip())
        elif name != "/quit":
            say(HELP if name == "/help" else f"{name}: no such command; {HELP}")
        return name != "/quit"

    def _set_temperature(self, value: str) -> None:
        try:
            wanted = float(value) if value else self.temperature
        except ValueError:
            wanted = math.nan
        if 0 <= wanted < math.inf:
            self.temperature = wanted
            say(f"temperature {wanted:g}")
        else:
            say(f"/temp {value}: must be a number, at least 0")


def say(text: str) -> None:
    """Print on standard error what is not a reply."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def ctrl_c(handler: Callable[[int, Any], object]) -> Iterator[None]:
    """Inside, `handler` takes Ctrl-C."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@torch.no_grad()
def score(model: RewardModel, speaker: Speaker, prompt: str, reply: Reply) -> float:
    """The reward model's score of a reply, of the ids as they were sampled; nan where there is none to score."""
    row = encode_example(speaker.encoding, prompt, reply.ids, max_length=model.gpt.config.n_positions)
    if row is None or not reply.ids:
        return math.nan
    batch = pad([row]).to(model.score.weight.device)
    return model(batch.tokens, batch.lengths).item()


# ------------------------------------------------------------------------------------------------------------- showing
def one_by_one(names: list[str], replies: list[Iterator[str]]) -> None:
    """Each reply as it is written, one below the other."""
    for name, texts in zip(names, replies, strict=True):
        written = 0
        print(f"{name}: " if len(names) > 1 else "", end="", flush=True)
        for text in texts:
            print(text[written:], end="", flush=True)
            written = len(text)
        print(flush=True)


def side_by_side(names: list[str], replies: list[Iterator[str]]) -> None:
    """Two replies in two columns of a terminal, a token of each in turn."""
    size = shutil.get_terminal_size()
    width = (size.columns - 5) // 2
    lines: list[str] = []
    shown = ["", ""]
    for texts in zip_longest(*replies):
        shown = [before if text is None else text for before, text in zip(shown, texts, strict=True)]
        sides = [[f"[{name}]", *wrap(text, width)] for name, text in zip(names, shown, strict=True)]
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
    chat = Chat(config)
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


if __name__ == "__main__":
    run_into_a_pipe(main, PRESETS)
