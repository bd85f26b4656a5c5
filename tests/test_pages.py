"""Pages: what they escape, that they are self-contained and repeatable, and how a real browser shows them."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest

from ppf.lab.pages import Page, figure
from ppf.lab.pages.style import COLOURS, SERIES

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
VOID = {"meta", "link", "img", "br", "hr"}

# Both widths in one window; what the frames' documents and windows measure ends up in the wrapper's title.
_FRAMES = """<body><iframe id="a" src="{page}" style="width:390px;height:2000px;border:0"></iframe>
<iframe id="b" src="{page}" style="width:1280px;height:2000px;border:0"></iframe><script>
function shown(f, kind) {{
  return [...f.contentDocument.querySelectorAll("svg." + kind)].filter(s => s.getBoundingClientRect().width > 0).length;
}}
onload = () => {{ document.title = [...document.querySelectorAll("iframe")].map(f => [
  f.contentDocument.documentElement.scrollWidth, f.contentWindow.innerWidth, shown(f, "narrow"), shown(f, "wide"),
  getComputedStyle(f.contentDocument.documentElement).backgroundColor,
  getComputedStyle(f.contentDocument.querySelector("svg text")).fill].join(";")).join("|"); }}
</script></body>"""


def drawing(labels: bool = True, columns: int = 1):
    with figure(height=3.0, columns=columns) as (fig, axes):
        for index, ax in enumerate(np.atleast_1d(axes)):
            ax.plot([0, 1, 2], [1, 2, 4 + index], marker="o", label="measured")
            ax.fill_between([0, 1, 2], [1, 1, 3], [2, 3, 5], alpha=0.2)
            if labels:
                ax.set(xlabel="ratio (%)", ylabel="perplexity", title="A <title> & more")
    return fig


@pytest.fixture
def page() -> Page:
    page = Page("Report <1>", "sub & title")
    page.heading("Quality")
    page.text("<script>alert(1)</script>")
    page.facts({"path": "/a" * 200, "tokens": 405_504})
    page.table(["method", "perplexity", "note"], [["uniform", "144.4", "a"], ["<ours>", "91.6 ± 3.1", "b"]], "Text.", 1)
    page.figure(drawing(), "First.", alt='A "rising" curve')
    page.figure(drawing(columns=2), "Second.")
    page.code("ppf prune RUN --ratio 0.5   " + "# long " * 60)
    return page


class _Balance(HTMLParser):
    """Raises AssertionError for a tag that is not closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(html: str) -> list[tuple[str, dict]]:
    parser = _Balance()
    parser.feed(html)
    assert parser.open == []
    return parser.seen


def test_a_page_is_well_formed_escaped_and_needs_nothing_from_outside(page):
    html = page.html()
    tags = parsed(html)
    assert "&lt;script&gt;alert(1)" in html and "&lt;ours&gt;" in html and "Report &lt;1&gt;" in html
    names = {tag for tag, _ in tags}
    assert not names & {"script", "link", "iframe", "img", "object"}
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", html)
    assert "http" not in without_namespaces and "@import" not in html and "@font-face" not in html
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in tags
    assert any(a.get("aria-label") == 'A "rising" curve' for tag, a in tags if tag == "svg")


def test_the_same_calls_give_the_same_bytes(page, tmp_path):
    again = Page("Report <1>", "sub & title")
    again._parts = page._parts[:-3]
    again.figure(drawing(), "First.", alt='A "rising" curve')
    again.figure(drawing(columns=2), "Second.")
    again._parts += page._parts[-1:]
    assert again.html() == page.html()
    page.write(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page.html()
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


def test_plots_take_the_colours_of_the_theme_and_keep_their_ids_apart(page):
    svgs = re.findall(r"<svg.*?</svg>", page.html(), flags=re.DOTALL)
    assert len(svgs) == 4  # each figure wide and narrow
    for svg in svgs:
        # No fixed colour is left: black on black would be invisible in the dark.
        assert re.findall(r"(?:fill|stroke): *#\w+", svg) == []
        assert "var(--series-1)" in svg and "var(--ink)" in svg and "ratio (%)" in svg
        used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
        assert used and used == set(re.findall(r'\bid="([^"]+)"', svg))
    ids = re.findall(r'\bid="([^"]+)"', page.html())
    assert len(ids) == len(set(ids))


def test_boxes_and_outlines_are_visible_in_the_dark():
    page = Page("Boxes")
    with figure() as (fig, ax):
        ax.boxplot([[1, 2, 3, 4, 30], [2, 3, 5, 8, 9]])
        ax.errorbar([1, 2], [3, 4], yerr=1, capsize=2)
        ax.axhline(2)
        ax.bar([1], [1], hatch="//")
        ax.set(xlabel="ratio (%)", ylabel="error (nats)")
    page.figure(fig, "Residuals.")
    for svg in re.findall(r"<svg.*?</svg>", page.html(), flags=re.DOTALL):
        assert re.findall(r"(?:fill|stroke): *(?:#\w+|black)", svg) == []


def test_numbers_are_aligned_and_one_row_stands_out(page):
    html = page.html()
    assert html.count('class="marked"') == 1 and '<tr class="marked"><td>&lt;ours&gt;</td>' in html
    assert '<th scope="col" class="number">perplexity</th>' in html and '<th scope="col">method</th>' in html
    with pytest.raises(ValueError, match="2 cells"):
        page.table(["a"], [["1", "2"]])
    with pytest.raises(IndexError):
        page.table(["a"], [["1"]], highlight=1)


def test_an_axis_without_labels_is_refused_and_the_figure_is_left_as_it_was(page):
    with pytest.raises(ValueError, match="no label"):
        page.figure(drawing(labels=False), "Nothing named.")
    fig = drawing(columns=2)
    before = fig.get_size_inches().tolist(), [axes.get_subplotspec() for axes in fig.axes]
    page.figure(fig, "Twice drawn.")
    assert (fig.get_size_inches().tolist(), [axes.get_subplotspec() for axes in fig.axes]) == before


def test_nothing_global_of_matplotlib_changes():
    before = dict(matplotlib.rcParams)
    with figure() as (_, ax):
        assert ax.plot([0], [0])[0].get_color() == SERIES[0]
    assert dict(matplotlib.rcParams) == before


def test_lines_are_told_apart_and_logarithmic_axes_show_plain_numbers():
    with figure() as (fig, ax):
        for index in range(3 * len(SERIES)):
            ax.plot([0, 1], [30, 40 + index])
        ax.set(xlabel="ratio (%)", ylabel="perplexity", yscale="log")
    assert len({(line.get_color(), line.get_linestyle()) for line in ax.lines}) == len(ax.lines)
    page = Page("Logarithmic")
    page.figure(fig, "A caption.")
    texts = re.findall(r"<text.*?</text>", page.html(), flags=re.DOTALL)
    labels = ["".join(re.sub(r"<[^>]*>", "", text).split()) for text in texts]
    assert "40" in labels and not any("×" in label for label in labels)


def test_text_has_contrast_in_both_themes():
    """At least 4.5:1 (WCAG 2.1, AA) for text, 3:1 for the lines of plots."""
    for theme in (0, 1):
        paper = _luminance(COLOURS["paper"][theme])
        for name, pair in COLOURS.items():
            low, high = sorted((paper, _luminance(pair[theme])))
            contrast = (high + 0.05) / (low + 0.05)
            assert contrast >= 4.5 or name not in ("ink", "muted"), (name, theme)
            assert contrast >= 3 or not name.startswith("series"), (name, theme)


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_a_browser_shows_it_in_both_widths_without_scrolling_the_page_sideways(page, tmp_path, theme):
    page.write(tmp_path / "page.html")
    (tmp_path / "frames.html").write_text(_FRAMES.format(page="page.html"))
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    # Chromium counts the other way round: 0 is dark.
    options += [f"--blink-settings=preferredColorScheme={1 - theme}", f"--user-data-dir={tmp_path / 'profile'}"]
    url = (tmp_path / "frames.html").as_uri()
    done = subprocess.run([BROWSER, *options, url], capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stderr[-2000:]
    phone, desk = (frame.split(";") for frame in title[1].split("|"))
    ink, paper = (
        f"rgb({', '.join(str(int(COLOURS[n][theme][i : i + 2], 16)) for i in (1, 3, 5))})" for n in ("muted", "paper")
    )
    for (content, window, narrow, wide, background, text), shown in ((phone, ("2", "0")), (desk, ("0", "2"))):
        assert int(content) <= int(window) and (narrow, wide) == shown
        assert background == paper and text == ink
