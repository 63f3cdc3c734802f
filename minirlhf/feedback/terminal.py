"""Labelling in the terminal: the two answers side by side, one key a label."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import sys
import textwrap
from collections.abc import Iterator
from itertools import zip_longest

from minirlhf.feedback.session import Session
from minirlhf.feedback.tasks import Task
from minirlhf.runtime import require

NARROW = 80  # columns below which answers stand one above the other
ESCAPES = {b"\x1b[D": "left", b"\x1b[C": "right", b"\x1bOD": "left", b"\x1bOC": "right"}
NAMED = {b"\r": "enter", b"\n": "enter", b"\x7f": "u", b"\x08": "u"}
PAIR_KEYS = "[1 or \N{LEFTWARDS ARROW}] left  [2 or \N{RIGHTWARDS ARROW}] right  [t] tie  [b] both bad"
RANKING_KEYS = "[1-{count}] from best to worst  [=] next ties  [Enter] the rest are equal  [t] all tie  [b] all bad"
OTHER_KEYS = "[s] skip  [u] undo  [n] note  [q] quit"


def label_in_terminal(session: Session) -> None:
    """Ask until all is done, or q, or the end of input. Raises UserError where there is no terminal."""
    words = "label: standard input is not a terminal; start it in one, or use --page"
    require(sys.stdin.isatty() and sys.stdout.isatty(), words)
    descriptor = sys.stdin.fileno()
    with single_keys(descriptor):
        while (task := session.current) is not None:
            lines = ["\x1b[2J\x1b[H", *page(session, task, shutil.get_terminal_size().columns)]  # on a cleared screen
            print(*lines, sep="\r\n", end="", flush=True)
            key = read_key(descriptor)
            if key in ("q", ""):
                break
            if key == "n":
                session.note = read_line(descriptor, "note: ", session.note)
                session.message = "the note is saved with the label" if session.note else "no note"
            else:
                session.press(key)
    progress = session.progress
    print(f"\n{progress['done']} of {progress['total']} done; {session.file.path}")


@contextlib.contextmanager
def single_keys(descriptor: int) -> Iterator[None]:
    """Inside, a key arrives as it is pressed and is not shown; Ctrl-C still stops the program."""
    import termios
    import tty

    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor, termios.TCSADRAIN)  # not FLUSH: keys typed ahead count
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def read_key(descriptor: int) -> str:
    """The next key by its name, "" at the end of input or for Ctrl-D. Reads no further than that key."""
    byte = os.read(descriptor, 1)
    if byte == b"\x04":
        return ""
    if byte == b"\x1b":
        while len(byte) < 3 and select.select([descriptor], [], [], 0.05)[0]:
            byte += os.read(descriptor, 1)
        return ESCAPES.get(byte, "escape")
    return NAMED.get(byte, byte.decode("latin-1").lower())


def read_line(descriptor: int, question: str, text: str) -> str:
    """A line typed by the user, starting from `text`; Enter ends it, Backspace deletes, Escape keeps `text`."""
    typed = text.encode()
    while True:
        print(f"\r\x1b[K{question}{printable(typed.decode('utf-8', 'ignore'))}", end="", flush=True)
        byte = os.read(descriptor, 1)
        if byte in (b"\x1b", b""):
            return text
        if byte in (b"\r", b"\n"):
            return typed.decode("utf-8", "ignore").strip()
        if byte in (b"\x7f", b"\x08"):
            typed = typed.decode("utf-8", "ignore")[:-1].encode()
        elif byte >= b" ":
            typed += byte


def page(session: Session, task: Task, width: int) -> list[str]:
    """The lines of the screen."""
    progress = session.progress
    left = "" if progress["minutes_left"] is None else f", about {progress['minutes_left']:.0f} min left"
    rate = f"   {progress['rate']:.0f} a minute{left}" if progress["rate"] else ""
    lines = [f"{progress['done']} of {progress['total']}{rate}", "", *wrap(task.question, width), ""]
    beside = len(task.answers) == 2 and width >= NARROW
    room = (width - 5) // 2 if beside else width
    columns = [[f"[{i}]", *wrap(text.strip() or "(empty)", room)] for i, text in enumerate(task.answers, 1)]
    if beside:
        lines += [f"{a:<{room}}  |  {b}".rstrip() for a, b in zip_longest(*columns, fillvalue="")]
    else:
        lines += [line for column in columns for line in (*column, "")]
    keys = PAIR_KEYS if len(columns) == 2 else RANKING_KEYS.format(count=len(columns))
    note = [f"note: {printable(session.note)}"] if session.note else []
    return [*lines, "", *wrap(keys, width), *wrap(OTHER_KEYS, width), *note, printable(session.message), ""]


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` characters; the text's own line breaks stay."""
    return [line for part in printable(text).split("\n") for line in textwrap.wrap(part, max(width, 20)) or [""]]


def printable(text: str) -> str:
    """Text that cannot steer the terminal: what does not print is shown as U+FFFD. A model can write anything."""
    return "".join(
        c if c.isprintable() or c == "\n" else " " if c == "\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
