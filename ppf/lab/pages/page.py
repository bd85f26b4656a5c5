"""A page: paragraphs, facts, tables and figures, one below the other, in one HTML file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..._version import versions
from ...storage.files import write_text
from .figures import key_of, svg_for_page
from .style import COLOURS, STYLE

_NUMBER = re.compile(r"^[-+−±]?[\d.,]+(?:e[-+]?\d+)?(?:\s?[^\d\s]{1,8})?(?:\s?±\s?[\d.,]+\s?%?)?$")
_EMPTY = ("", "-", "–", "—")


class Page:
    """A self-contained HTML page; the same calls give the same bytes. All text is escaped."""

    def __init__(self, title: str, subtitle: str = ""):
        self.title, self.subtitle = title, subtitle
        self._parts: list[str] = []
        self._figures = 0

    def text(self, paragraph: str) -> None:
        """A paragraph."""
        self._parts.append(f"<p>{escape(paragraph)}</p>")

    def heading(self, title: str) -> None:
        """The title of a section."""
        self._parts.append(f"<h2>{escape(title)}</h2>")

    def code(self, text: str) -> None:
        """Commands or files, as they are."""
        self._parts.append(f"<pre><code>{escape(text)}</code></pre>")

    def facts(self, facts: Mapping[str, Any]) -> None:
        """Names and values, one a line."""
        pairs = "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items())
        self._parts.append(f"<dl>\n{pairs}\n</dl>")

    def table(
        self, headers: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", highlight: int | None = None
    ) -> None:
        """A table that scrolls sideways where the screen is too narrow; columns of numbers are aligned on the right.

        ``highlight`` is the index of the row that stands out. Raises ``ValueError`` for a row of another length.
        """
        _require_rectangle(headers, rows)
        numeric = [_is_numeric([str(row[column]) for row in rows]) for column in range(len(headers))]
        marked = None if highlight is None else range(len(rows))[highlight]
        lines = [_row("td", row, numeric, index == marked) for index, row in enumerate(rows)]
        # Beside the table, not in it: it would scroll away with it.
        below = f'\n<p class="caption">{escape(caption)}</p>' if caption else ""
        body = "\n".join(lines)
        # tabindex: what scrolls can be reached with the keyboard.
        self._parts.append(
            f'<div class="scroll" tabindex="0"><table><thead>{_row("th", headers, numeric)}</thead>\n'
            f"<tbody>\n{body}\n</tbody></table></div>{below}"
        )

    def figure(self, fig: Figure, caption: str, alt: str = "") -> None:
        """A plot from :func:`ppf.lab.pages.figure` as inline SVG; ``alt`` (or else the caption) says what it shows."""
        self._figures += 1
        drawing = svg_for_page(fig, alt or caption, key_of(self.title, str(self._figures)))
        self._parts.append(f"<figure>\n{drawing}\n<figcaption>{escape(caption)}</figcaption></figure>")

    def html(self) -> str:
        """The whole page."""
        subtitle = f'<p class="subtitle">{escape(self.subtitle)}</p>\n' if self.subtitle else ""
        body = "\n".join(self._parts)
        themes = "\n".join(
            f'<meta name="theme-color" media="(prefers-color-scheme: {theme})" content="{colour}">'
            for theme, colour in zip(("light", "dark"), COLOURS["paper"], strict=True)
        )
        return (
            f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n{themes}\n'
            f"<title>{escape(self.title)}</title>\n<style>\n{STYLE}\n</style>\n</head>\n<body>\n"
            f"<header><h1>{escape(self.title)}</h1>\n{subtitle}</header>\n<main>\n{body}\n</main>\n"
            f"<footer>ppf {versions()['ppf']}</footer>\n</body>\n</html>\n"
        )

    def write(self, path: str | Path) -> None:
        """Write the page to ``path``, atomically; raises ``InputError`` when the disk is full."""
        write_text(path, self.html())


def _require_rectangle(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    for row in rows:
        if len(row) != len(headers):
            raise ValueError(f"a row has {len(row)} cells, the table {len(headers)} columns: {row}")


def _row(tag: str, cells: Sequence[str], numeric: Sequence[bool], marked: bool = False) -> str:
    """One line of a table; columns that are ``numeric`` are aligned on the right."""
    scope = ' scope="col"' if tag == "th" else ""
    kinds = (' class="number"' if number else "" for number in numeric)
    inner = "".join(f"<{tag}{scope}{kind}>{escape(str(cell))}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))
    return f'<tr class="marked">{inner}</tr>' if marked else f"<tr>{inner}</tr>"


def _is_numeric(cells: Sequence[str]) -> bool:
    """True if every cell that is not empty is a number, with a unit at most."""
    filled = [cell.strip() for cell in cells if cell.strip() not in _EMPTY]
    return bool(filled) and all(_NUMBER.match(cell) for cell in filled)
