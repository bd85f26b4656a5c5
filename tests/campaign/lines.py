"""Command lines: every option of every command with values that nobody should give, and some that one may."""

from __future__ import annotations

import random
import typing
from functools import cache

from . import children
from .ground import FIT, PROFILE, Ground
from .judging import judged
from .outcomes import Verdict

_CPU = ("--device", "cpu")
_EVAL = "--text", "text.txt", "--sequence-length", 32, "--tokens", 128, *_CPU
# A call of every command that works, and takes no longer than it must. Options that follow win.
_HONEST: dict[str, tuple[object, ...]] = {
    "fit": ("model", "--text", "text.txt", "--output", "new", *FIT),
    "policy": ("run",),
    "prune": ("run", "--output", "out", *_CPU),
    "eval": ("pruned", *_EVAL),
    "generate": ("pruned", "--prompt", "the old", "--max-new-tokens", 2, *_CPU),
    "export": ("even", "--output", "out"),
    "recover": (
        *("pruned", "--text", "text.txt", "--output", "out", "--tokens", 256, "--sequence-length", 32),
        *("--batch-tokens", 128, *_CPU),
    ),
    "info": (),
    "report": ("run", "--held-out", 20, *_CPU),
    "compare": (
        *("run", "--text", "test.txt", "--output", "out", "--tokens", 256, "--methods", "uniform,flap"),
        *("--ratios", "0.3", *_CPU),
    ),
    "pareto": ("run",),
    "bench": ("pruned", "--prompt", 4, "--new-tokens", 2, "--prefill", 8, "--runners", "ppf", *_CPU),
    "profile": ("run", *PROFILE),
}
# Seconds; under the limit of a child.
_LONG_ENOUGH = 10.0
# `ppf demo` takes a minute and few options; tests/test_demo.py runs it. The last ones compute for seconds each.
_COMMANDS = tuple(_HONEST) * 4 + ("policy", "prune", "eval", "export", "info", "generate") * 6
_NUMBERS = (
    *("0", "1", "2", "3", "7", "8", "16", "24", "0.3", "0.5", "0.001", "0.999", "-1", "-0.5", "1e-9", "1e9", "1e308"),
    *("nan", "inf", "-inf", "1e400", "9" * 40, "-" + "9" * 40, "0x10", "1_000", "٣", "½", "", " ", "3.0", "1,5", "1e3"),
)
_WORDS = (
    *("", " ", "auto", "cpu", "cuda", "cuda:99", "meta", "mps", "float16", "bfloat16", "float64", "gpu", "host"),
    *("disk", "hf", "gguf", "vllm", "deci", "f16", "q8_0", "mlp", "cnn", "gp", "pathwise", "lora", "full", "norms"),
    *("magnitude", "obs", "taylor", "all", "uniform:0", "static:-1", "static:3", "flap,flap", "0.2,0.3", "0.2,,x"),
    *("train", "text", "a\nb", "a\x1b[2J", "\u202egnp", "é" * 300, "x" * 5000, "--", "-", "{}", "%s%n", "ppf,eager"),
)
_PATHS = (
    *("run", "pruned", "even", "model", "text.txt", "policy.json", "nowhere", "", ".", "..", "/", "new/deep/er"),
    *("/dev/null", "/dev/full", "/proc/self/mem", "/proc/1/root/x", "empty", "text.txt/below", "x" * 300),
    *("a\nb", "a\x1b[2J", "\udcff\udcfe", "run/run.json", "run/library", "link", "~", "org/name", "x.gguf"),
)


@cache
def _options(command: str) -> dict[str, str]:
    """The options of a command, each with its type in Python's words."""
    import typer

    from ppf.cli import app

    function = next(entry.callback for entry in app.registered_commands if entry.name == command)
    kinds = typing.get_type_hints(function)
    parameters = typer.main.get_command(app).commands[command].params
    return {p.opts[0]: str(kinds.get(p.name)) for p in parameters if p.param_type_name == "option"}


def attempt(ground: Ground, seed: int) -> Verdict:
    draw = random.Random(f"lines {seed}")
    command = draw.choice(_COMMANDS)
    words = [command, *map(str, _HONEST[command])]
    if command == "info":
        words.append(draw.choice(_PATHS))
    elif draw.random() < 0.1:
        words[1] = draw.choice(_PATHS)
    for name in draw.sample(sorted(_options(command)), k=min(len(_options(command)), draw.choice((0, 1, 1, 1, 2, 3)))):
        words += _value(draw, command, name)
    if command in ("policy", "prune") and draw.random() < 0.6:
        words += ["--ratio", draw.choice(("0.3", "0.5", *_NUMBERS))]
    if command == "export" and "--to" not in words:
        words += ["--to", draw.choice(("hf", "gguf", "vllm", "deci"))]
    if draw.random() < 0.02:
        words.insert(draw.randrange(len(words)), draw.choice(("--nothing", "extra", "-x", "")))
    return _judged(ground, words)


def _value(draw: random.Random, command: str, name: str) -> list[str]:
    kind = _options(command)[name]
    if "bool" in kind or name == "--help":
        return [name]
    usual = _PATHS if "Path" in kind or name.endswith("text") else _WORDS if "str" in kind else _NUMBERS
    return [name, draw.choice(usual if draw.random() < 0.9 else _WORDS + _NUMBERS + _PATHS)]


def _judged(ground: Ground, words: list[str]) -> Verdict:
    what = " ".join(repr(word)[:60] if not word.isprintable() or len(word) > 60 else word or "''" for word in words)
    with ground.scratch("run", "pruned", "even", "model", "text.txt", "test.txt", "policy.json") as here:
        (here / "empty").mkdir()
        (here / "link").symlink_to("link")
        # What was asked for may take hours: that it began is enough, and that it ends when it is told to.
        ended = children.Child(children.command(*words), here).wait(stop_after=_LONG_ENOUGH)
        return judged(ended, what, ended.stopped)
