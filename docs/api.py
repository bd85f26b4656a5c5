"""Writes docs/api.md from the docstrings of what users import. Run it after a change of the public API.

python docs/api.py
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

PAGE = Path(__file__).with_name("api.md")
MODULES = (
    "ppf",
    "ppf.families",
    "ppf.checkpoint",
    "ppf.choose.budget",
    "ppf.deliver.recovery",
    "ppf.fast.runtime",
    "ppf.deliver.export",
    "ppf.lab.comparison",
    "ppf.lab.pages",
)
_HEAD = """# Python reference
Made by `python docs/api.py` from the docstrings. Everything here can be imported from the module it stands under.
Whatever a user can get wrong raises `ppf.InputError`, which names the field, its value and the remedy."""


def page() -> str:
    """The whole reference as Markdown; the same sources give the same text."""
    parts, seen = [_HEAD], {}
    for name in MODULES:
        module = importlib.import_module(name)
        parts.append(f"## {name}\n\n{_prose(inspect.cleandoc(module.__doc__))}")
        offered = list(public(module))
        above = [f"`{title}` ({seen[id(thing)]})" for title, thing in offered if id(thing) in seen]
        if above:
            parts.append(f"Described above: {', '.join(above)}.")
        parts += [_entry(title, thing, offered) for title, thing in offered if id(thing) not in seen]
        seen |= {id(thing): name for _, thing in offered if id(thing) not in seen}
    return "\n\n".join(parts) + "\n"


def public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Names and values of the classes and functions that ``module`` offers, in alphabetical order."""
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    for name in sorted(getattr(module, "__all__", own)):
        value = getattr(module, name)
        if not name.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value)):
            yield name, value


def _entry(name: str, thing: Any, offered: list[tuple[str, Any]]) -> str:
    """One class with its methods, or one function; ``offered`` are the others that the page describes beside it."""
    lines = [f"### {name}", f"```python\n{_call(name, thing)}\n```", _prose(_docstring(thing))]
    if inspect.isclass(thing):
        if _own_init(thing):
            lines.append(_prose(_docstring(thing.__init__)))
        members = (_member(key, value) for key, value in _members(thing, [other for _, other in offered]))
        lines.append("\n".join(member for member in members if member))
    return "\n\n".join(line for line in lines if line)


def _members(thing: type, described: list[Any]) -> Iterator[tuple[str, Any]]:
    """What a class has of its own, and from a base of its name, which it stands for: users import the one above."""
    found: dict[str, Any] = {}
    for base in thing.__mro__:
        if base is thing or (base.__name__ == thing.__name__ and base not in described):
            found = vars(base) | found
    yield from ((key, value) for key, value in found.items() if not key.startswith("_"))


def _member(name: str, value: Any) -> str:
    """A line about a method or a property that has a docstring of its own; nothing for the rest."""
    if isinstance(value, (property, cached_property)):
        text = _docstring(value.fget if isinstance(value, property) else value.func)
        return f"* `{name}`: {_flat(text)}" if text else ""
    function = getattr(value, "__func__", value)
    if not inspect.isfunction(function) or not (text := _docstring(function)):
        return ""
    return f"* `{_call(name, function, skip_first=not isinstance(value, staticmethod))}`: {_flat(text)}"


def _docstring(thing: Any) -> str:
    """As it stands in our source: libraries rewrite docstrings of subclasses, and generated methods have their own."""
    if not (getattr(thing, "__module__", None) or "").startswith("ppf"):
        return ""
    try:
        source = textwrap.dedent(inspect.getsource(thing))
    except (OSError, TypeError):  # made by a decorator
        return ""
    return ast.get_docstring(ast.parse(source).body[0]) or ""


def _call(name: str, thing: Any, skip_first: bool = False) -> str:
    """``name(parameter: type = default, ...) -> type``, as it stands in the source."""
    if inspect.isclass(thing):
        return f"class {_class_call(name, thing)}"
    signature = inspect.signature(thing)
    parameters = list(signature.parameters.values())[1 if skip_first else 0 :]
    shown, starred = [], False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            shown.append("*")
        starred = starred or parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        shown.append(_parameter(parameter))
    typed = signature.return_annotation is not signature.empty and thing.__name__ != "__init__"
    return f"{name}({', '.join(shown)})" + (f" -> {_type(signature.return_annotation)}" if typed else "")


def _class_call(name: str, thing: type) -> str:
    """How to make one; for subclasses of other libraries' classes only what they are."""
    base = thing.__bases__[0]
    if not base.__module__.startswith(("ppf", "builtins")):
        return f"{name}({', '.join(base.__name__ for base in thing.__bases__)})"
    if is_dataclass(thing):
        return f"{name}({', '.join(_field(field) for field in fields(thing) if field.init)})"
    return _call(name, thing.__init__, skip_first=True) if _own_init(thing) else f"{name}({base.__name__})"


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    typed = "" if parameter.annotation is parameter.empty else f": {_type(parameter.annotation)}"
    default = "" if parameter.default is parameter.empty else f" = {_value(parameter.default)}"
    return f"{stars}{parameter.name}{typed}{default}"


def _field(field: Any) -> str:
    given = "" if field.default is MISSING else f" = {_value(field.default)}"
    return f"{field.name}: {_type(field.type)}{given}"


def _own_init(thing: type) -> bool:
    """True for an ``__init__`` in the source, not made by ``dataclass``."""
    return "__init__" in vars(thing) and not is_dataclass(thing)


def _type(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def _value(default: Any) -> str:
    """Functions by name: their address would change with every run."""
    return default.__name__ if inspect.isfunction(default) else repr(default)


def _prose(text: str) -> str:
    """A docstring as Markdown: single backticks, references to other objects as code, layouts left as they are."""
    text = re.sub(r":(?:func|class|meth|mod|data|attr):`~?([^`]+)`", r"`\1`", text).replace("``", "`")
    paragraphs = text.split("\n\n")
    return "\n\n".join(_paragraph(paragraph) for paragraph in paragraphs)


def _paragraph(text: str) -> str:
    """Lines with two blanks inside, or indented, are tables and examples: they go into a code block."""
    lines = text.split("\n")
    return f"```text\n{textwrap.dedent(text)}\n```" if all(re.search(r"^ |\S  +\S", line) for line in lines) else text


def _flat(text: str) -> str:
    return " ".join(_prose(text).split())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
