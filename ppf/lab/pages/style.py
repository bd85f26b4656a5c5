"""The look of all pages: colours for light and dark, and the style sheet.

A colour stands in a plot as the hex value of its light theme, so that the same figure can also be saved as a picture;
in a page it becomes the CSS variable of its name, which changes with the theme.
"""

from __future__ import annotations

# Name → (light, dark). Series colours differ in lightness too, so that they survive colour blindness and grey printing.
COLOURS = {
    "ink": ("#1b2126", "#e6e9ec"),
    "muted": ("#57606a", "#a3adb7"),
    "grid": ("#d7dce1", "#363d45"),
    "paper": ("#fcfcfd", "#14181c"),
    "panel": ("#f0f3f5", "#1e242a"),
    "mark": ("#fdf0cf", "#423713"),
    "series-1": ("#1f5fa8", "#74b3f7"),
    "series-2": ("#c4570f", "#f3a063"),
    "series-3": ("#1d8a5b", "#63d1a1"),
    "series-4": ("#7b3fa6", "#c59af0"),
    "series-5": ("#a82a3c", "#f08795"),
    "series-6": ("#5f6f1e", "#bfce6a"),
}
SERIES = tuple(light for name, (light, _) in COLOURS.items() if name.startswith("series"))

# Below this width of the window, in CSS pixels, the narrow drawing of a figure is shown.
NARROW = 640


def _variables(theme: int) -> str:
    return " ".join(f"--{name}: {pair[theme]};" for name, pair in COLOURS.items())


STYLE = f"""
:root {{ color-scheme: light dark; {_variables(0)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(1)} }} }}
* {{ box-sizing: border-box; }}
html {{ background: var(--paper); -webkit-text-size-adjust: 100%; }}
body {{ margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 60rem; color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }}
h1 {{ font-size: 1.75rem; line-height: 1.2; margin: 0; }}
h2 {{ font-size: 1.25rem; line-height: 1.3; margin: 2.5rem 0 0.75rem; padding-top: 0.75rem;
  border-top: 1px solid var(--grid); }}
p {{ margin: 0.75rem 0; max-width: 44rem; overflow-wrap: break-word; }}
.subtitle, .caption, figcaption, dt, footer {{ color: var(--muted); }}
.subtitle {{ font-size: 1.1rem; margin: 0.35rem 0 0; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: 0.3rem 1.25rem; margin: 1rem 0; }}
dd {{ margin: 0; overflow-wrap: anywhere; }}
figure {{ margin: 1.25rem 0; }}
figure svg {{ display: block; width: 100%; height: auto; }}
figure svg.narrow {{ display: none; }}
figcaption, .caption {{ font-size: 0.9rem; line-height: 1.45; max-width: 44rem; }}
figcaption {{ margin-top: 0.5rem; }}
.scroll {{ overflow-x: auto; margin: 1rem 0; }}
table {{ border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums; }}
.scroll + .caption {{ margin-top: -0.4rem; }}
th, td {{ padding: 0.4rem 0.8rem; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--grid); }}
thead th {{ border-bottom: 2px solid var(--muted); vertical-align: bottom; }}
.number {{ text-align: right; }}
tr.marked > * {{ background: var(--mark); font-weight: 600; }}
pre {{ overflow-x: auto; padding: 0.75rem 1rem; background: var(--panel); border-radius: 0.4rem; font-size: 0.88rem; }}
footer {{ margin-top: 3rem; font-size: 0.85rem; }}
@media (max-width: {NARROW - 1}px) {{
  dl {{ grid-template-columns: 1fr; gap: 0; }}
  dd {{ margin: 0 0 0.6rem; }}
  figure svg.narrow {{ display: block; }}
  figure svg.wide {{ display: none; }}
}}
@media print {{ body {{ max-width: none; }} }}
""".strip()
