"""What users rely on stays: features.json is a frozen list of it, and a difference that nobody explained fails here.

A change that is meant has an entry under "changes":

    {"what": "flags: python train_ppo.py --beta", "was": {...}, "now": {...}, "reason": "..."}

null stands for what is not there, "there" for what is only listed. `python tests/test_features.py --write` begins a
new list, without changes. features.py finds out what there is.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import features
import pytest
import test_commands as pages

OPEN = ("commands", "imports")  # a page may show more than is listed
SHOWN = 12  # differences in a message


@pytest.mark.parametrize("section", features.SECTIONS)
def test_nothing_has_changed_without_a_reason(section: str) -> None:
    was = features.read_list()[section]
    now = features.SECTIONS[section](was)
    said = []
    for key in sorted(was if section in OPEN else {*was, *now}):
        before, after = json.dumps(was.get(key)), json.dumps(now.get(key))
        said += [f"{section}: {key}\n  was {before}\n  now {after}"] if before != after else []
    more = [f"and {len(said) - SHOWN} more"] if len(said) > SHOWN else []
    assert not said, "\n".join(["undo it, or give the reason in tests/features.json", *said[:SHOWN], *more])


def test_every_flag_has_a_help_text() -> None:
    for command, under in features.parsers().items():
        for reached in under.values():
            for action in reached.actions:
                said = re.sub(r"\(default: .*\)$", "", action.help or "", flags=re.S).strip()
                assert said, f"{command} {features.name_of(action)} has no help text"


def test_every_import_of_the_pages_works() -> None:
    shown = features.imports_of_the_pages()
    assert shown == features.imports(shown).keys()


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("page", [page for page in pages.PAGES if pages.commands(page)], ids=lambda page: page.name)
def test_every_command_of_a_page_is_understood(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """By its own parser; none is run."""
    monkeypatch.chdir(tmp_path)
    for command in pages.commands(page):
        program, first, *rest = command.words
        if program == "torchrun":
            first, *rest = rest[rest.index("--") + 1 :]
        if program == "make":
            assert re.search(f"^{first}:", (features.ROOT / "Makefile").read_text(encoding="utf-8"), re.M), (
                command.place
            )
        elif first.startswith(("benchmarks/", "studies/")) and first != pages.WITH_SETTINGS:
            pages.benchmark_flags(command)
        elif first.startswith(("data/", "studies/")):
            reached = features.reach(f"python {first}")
            assert isinstance(reached, features.Reached), f"{command.place}: {reached}"
            reached.parser.parse_args(rest)
        elif first.startswith("train_") or rest[0].startswith("minirlhf"):
            with monkeypatch.context() as patch:  # a mistake that the page shows is found later
                pages.run(command._replace(words=["python", first, *rest], code=0), patch, read_only=True)


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    features.write_list()
