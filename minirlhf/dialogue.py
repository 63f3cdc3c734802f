"""A dialogue with models that reply token by token: what is said so far, what comes next, and what ends a reply.

`chat.py` shows it on a screen. The dialogue is the plain text that all stages train on, `\\n\\nHuman: …\\n\\nAssistant:
…`, encoded as a whole by the one encoder; where it is longer than the context it loses its start.
"""

from __future__ import annotations

import codecs
import contextlib
import math
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import tiktoken
import torch

from minirlhf.batch import pad
from minirlhf.data.formats import ASSISTANT, HUMAN, as_text
from minirlhf.encode import encode_example, encode_prompt, encode_response
from minirlhf.feedback.terminal import printable
from minirlhf.generate import stream
from minirlhf.model import GPT
from minirlhf.reward import RewardModel
from minirlhf.runtime import Stream

HELP = "commands: /temp [T] shows or sets the temperature, /reset forgets the dialogue, /quit leaves"


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

    def prompt(self, question: str, kept: int | None) -> str:
        """The dialogue so far, `kept` earlier turns of it, with the question at its end."""
        earlier = self.turns if kept is None else self.turns[max(0, len(self.turns) - 2 * kept) :]
        return as_text([*earlier, (HUMAN, question)]) + ASSISTANT


@dataclass
class Round:
    """The replies of all speakers to one question, while they are written; `stopped` says whether Ctrl-C came."""

    names: list[str]
    replies: list[Reply]
    streams: list[Iterator[int]]
    stopped: Callable[[], bool]

    def advance(self, number: int) -> bool:
        """One more token for a reply; False where there is none, or after Ctrl-C."""
        reply = self.replies[number]
        token = None if reply.finished or self.stopped() else next(self.streams[number], None)
        if token is not None:
            reply.add(token)
        elif reply.more:
            reply.end()
        return token is not None


@dataclass
class Chat:
    """All that a chat knows between two questions. `warned`: that the start of this dialogue no longer fits."""

    speakers: list[Speaker]
    reward_model: RewardModel | None
    kept: int | None
    temperature: float
    seed: int
    questions: int = 0
    warned: bool = False

    def ask(self, question: str, *, show: Callable[[Round], None]) -> None:
        """Every speaker replies; `show` draws the tokens and prints. Ctrl-C ends the replies where they are."""
        prompts = [speaker.prompt(question, self.kept) for speaker in self.speakers]
        streams = [self._stream(speaker, prompt) for speaker, prompt in zip(self.speakers, prompts, strict=True)]
        replies = [Reply(speaker.encoding) for speaker in self.speakers]
        with stoppable() as stopped:
            show(Round([speaker.name for speaker in self.speakers], replies, streams, stopped))
            for speaker, prompt, reply in zip(self.speakers, prompts, replies, strict=True):
                speaker.turns += [(HUMAN, question), (ASSISTANT, reply.text)]
                self._remark(speaker, prompt, reply)
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

    def _remark(self, speaker: Speaker, prompt: str, reply: Reply) -> None:
        if not reply.finished:
            say(f"[{speaker.name}: cut off after {len(reply.ids)} tokens]")
        if self.reward_model is not None:
            print(f"[{speaker.name}: reward {score(self.reward_model, speaker, prompt, reply):.2f}]", flush=True)

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
    """What is not a reply, on standard error."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C raises nothing; gives a function that says whether it was pressed."""
    pressed: list[int] = []
    with ctrl_c(lambda number, frame: pressed.append(number)):
        yield lambda: bool(pressed)


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
    ids = reply.ids
    longest = model.gpt.config.n_positions
    row = encode_example(speaker.encoding, prompt, reply.text, max_length=longest, response_ids=ids)
    if row is None or not ids:
        return math.nan
    batch = pad([row]).to(model.score.weight.device)
    return model(batch.tokens, batch.lengths).item()
