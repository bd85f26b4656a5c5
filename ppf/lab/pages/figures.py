"""Plots in the house style, and their SVG for a page.

Text stays text in the SVG: it can be selected, read aloud and takes the theme's colour. Nothing global of matplotlib's
is changed: the style holds inside ``with figure(...)`` and while the SVG is written.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec

from .style import COLOURS, SERIES

# Verdana has the metrics of DejaVu Sans, with which matplotlib measures.
_FONTS = "Verdana, 'DejaVu Sans', sans-serif"
_INK, _MUTED, _GRID = (COLOURS[name][0] for name in ("ink", "muted", "grid"))
_RC: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.labelsize": 9.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _MUTED,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    # More lines than colours: the next round is dashed, then dotted.
    "axes.prop_cycle": cycler(linestyle=["-", "--", ":"]) * cycler(color=SERIES),
    # 40 on a logarithmic axis, not 4 x 10^1.
    "axes.formatter.min_exponent": 4,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "image.cmap": "viridis",
    # matplotlib draws these black, whatever the theme.
    **{f"boxplot.{part}props.color": _INK for part in ("box", "whisker", "cap")},
    "boxplot.medianprops.color": SERIES[1],
    "boxplot.flierprops.color": _MUTED,
    "boxplot.flierprops.markeredgecolor": _MUTED,
    "boxplot.flierprops.markerfacecolor": "none",
    "patch.edgecolor": _INK,
    "hatch.color": _INK,
    "lines.color": SERIES[0],
}
# Width of the drawing for phones, in inches of 72 points: about what 390 CSS pixels leave.
_NARROW_INCHES = 4.2


@contextmanager
def figure(width: float = 7.0, height: float = 4.0, rows: int = 1, columns: int = 1) -> Iterator[tuple[Figure, Any]]:
    """A matplotlib figure of ``width`` x ``height`` inches and its axes: one, or an array as ``subplots`` returns.

    Draw inside the ``with``: the house style (colours, grid, fonts) ends with it, and pyplot knows nothing of it.
    """
    with matplotlib.rc_context(_RC):
        drawn = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(drawn)
        yield drawn, drawn.subplots(rows, columns)


def svg_for_page(drawn: Figure, alt: str, key: str) -> str:
    """The figure twice as inline SVG in the page's colours, for wide and for narrow windows: the style sheet shows one.

    The second is narrower, with letters of the same size and all axes in one column. ``key`` makes the ids unique in
    the page; the same figure gives the same text. Raises ``ValueError`` for an axis that shows data and says of neither
    side what it is.
    """
    _require_labels(drawn)
    wide = _svg(drawn, alt, key, "wide")
    with _narrowed(drawn):
        return wide + "\n" + _svg(drawn, alt, f"{key}n", "narrow")


@contextmanager
def _narrowed(drawn: Figure) -> Iterator[None]:
    """``drawn`` for a phone; afterwards it is as it was."""
    width, height = drawn.get_size_inches()
    specs = {axes: spec for axes in drawn.axes if (spec := axes.get_subplotspec())}
    # Axes that share a cell (twinx) go on sharing one.
    cells = list(dict.fromkeys((spec.rowspan.start, spec.colspan.start) for spec in specs.values()))
    rows = max(1, len({row for row, _ in cells}))
    stacked = GridSpec(max(1, len(cells)), 1, figure=drawn)
    try:
        for axes, spec in specs.items():
            axes.set_subplotspec(stacked[cells.index((spec.rowspan.start, spec.colspan.start))])
        drawn.set_size_inches(_NARROW_INCHES, max(0.85 * height / rows, 2.4) * max(1, len(cells)))
        yield
    finally:
        drawn.set_size_inches(width, height)
        for axes, spec in specs.items():
            axes.set_subplotspec(spec)


def _require_labels(drawn: Figure) -> None:
    for axes in drawn.axes:
        if axes.axison and axes.has_data() and not (axes.get_xlabel() or axes.get_ylabel()):
            raise ValueError("an axis has no label: name what it shows, and its unit")


def _svg(drawn: Figure, alt: str, key: str, kind: str) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context(_RC | {"svg.hashsalt": key}):
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        drawn.savefig(buffer, format="svg", metadata=metadata)
    body = buffer.getvalue()
    body = body[body.index("<svg") :]
    body = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<defs>\s*</defs>", "", body, flags=re.DOTALL)
    body = _unique_ids(body, key)
    body = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", body, count=1)
    body = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", body, count=1)
    # Letters of 9.5 points become at most 13 pixels, whatever the width of the page.
    widest = f"max-width: {1.4 * 72 * drawn.get_figwidth():.0f}px"
    label = f'<svg class="{kind}" style="{widest}" role="img" aria-label="{escape(alt, quote=True)}"'
    return _themed(body).replace("<svg", label, 1).strip()


def _unique_ids(body: str, key: str) -> str:
    """Ids that two figures of one page share would make one's clipping and markers those of the other."""
    names = {name: f"{key}-{index}" for index, name in enumerate(dict.fromkeys(re.findall(r'\bid="([^"]+)"', body)))}
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    body = re.sub(r' id="([^"]+)"', lambda m: f' id="{names[m[1]]}"' if m[1] in used else "", body)
    return re.sub(r'(href="#|url\(#)([^")]+)', lambda m: m[1] + names[m[2]], body)


def _themed(body: str) -> str:
    """House colours become CSS variables; they may stand only in style attributes, so those are rewritten."""
    for name, (light, _) in COLOURS.items():
        body = re.sub(rf"(fill|stroke): {light}\b", rf"\1: var(--{name})", body)
    body = body.replace("font-family: 'DejaVu Sans'", f"font-family: {_FONTS}")
    return re.sub(r"(font: [^;\"]*)'DejaVu Sans'", rf"\1{_FONTS}", body)


def key_of(*parts: str) -> str:
    """A short id that depends on ``parts`` alone."""
    return "f" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]
