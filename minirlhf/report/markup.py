"""Text that becomes HTML: everything is escaped, but for what these functions made themselves.

Answers, prompts, paths and hints were written by models and by people: nothing of them is ever read as markup.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

MINUS = "\N{MINUS SIGN}"
LONGEST = 1000  # characters of a text that are shown


class Html(str):
    """Markup made here; every other string is text."""


def text(value: object) -> Html:
    """A value inside a page: markup as it is, anything else escaped, and of a long text the beginning."""
    return value if isinstance(value, Html) else Html(html.escape(cut(str(value))))


def cut(value: str) -> str:
    """A text, or its beginning and how much was left out."""
    return value if len(value) <= LONGEST else f"{value[:LONGEST]} … ({len(value) - LONGEST:,} more characters)"


def element(tag: str, *content: object, **attributes: object) -> Html:
    """`<tag attributes>content</tag>`; an attribute ends with _ where Python has the word, and _ inside becomes -."""
    words = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(cut(str(value)))}"' for name, value in attributes.items()
    )
    return Html(f"<{tag}{words}>{''.join(map(text, content))}</{tag}>")


def joined(parts: Iterable[Html], between: str = "") -> Html:
    """Pieces of markup one after the other."""
    return Html(between.join(parts))


def table(head: Sequence[object], rows: Iterable[Sequence[object]], **attributes: object) -> Html:
    """A table whose first column names its rows; it scrolls by itself where the screen is narrower."""
    top = element("tr", *(element("th", cell, scope="col") for cell in head))
    body = [
        element("tr", element("th", first, scope="row"), *(element("td", cell) for cell in cells))
        for first, *cells in rows
    ]
    inner = element("table", element("thead", top), element("tbody", *body), **attributes)
    return element("div", inner, class_="scroll", tabindex="0", role="region", aria_label="table")


def section(name: str, title: str, *content: object) -> Html:
    """A part of the page that the list of contents leads to."""
    heading = element("h2", title, id=f"{name}-title")
    return element("section", heading, *content, id=name, aria_labelledby=f"{name}-title")


def details(summary: object, *content: object) -> Html:
    """What is folded away until it is asked for."""
    return element("details", element("summary", summary), *content)


def number(value: float) -> str:
    """A number in at most four digits, a whole one in all of its own, with a true minus sign."""
    whole = float(value).is_integer() and abs(value) < 1e7
    return (f"{value:,.0f}" if whole else f"{value:.4g}").replace("-", MINUS)


def signed(value: float) -> str:
    """With its sign and two decimals."""
    return f"{value:+.2f}".replace("-", MINUS)


def brief(value: float) -> str:
    """With its sign, and only the decimals that it needs: +1, 0, +0.33."""
    return signed(value).rstrip("0").rstrip(".") if round(value, 2) else "0"
