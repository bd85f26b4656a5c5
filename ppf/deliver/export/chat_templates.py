"""Chat templates in terms of llama.cpp's Jinja, which knows less of transformers than templates may use.

Two things differ in what templates are given. transformers has a block ``generation`` around what a model said, which
writes nothing and marks what to train on: others stop at it. And it gives templates all special tokens by name, others
the begin and the end token only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from jinja2 import TemplateSyntaxError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from ...errors import InputError

_GIVEN = {"bos_token", "eos_token"}
# What stands within a tag stays, so that white space goes where it went.
_MARKS = {
    r"(\{%[-+]?\s*)generation(\s*[-+]?%\})": r"\1if true\2",
    r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})": r"\1endif\2",
}


def chat_templates(tokenizer: PreTrainedTokenizerBase) -> str | list[dict[str, str]] | None:
    """One template, or several, each with its "name"; None if there are none. Each writes what it writes in
    transformers. Raises ``InputError`` for one that is no Jinja."""
    templates, tokens = tokenizer.chat_template, tokenizer.special_tokens_map
    if isinstance(templates, dict):
        return [{"name": name, "template": _translated(text, tokens)} for name, text in templates.items()]
    return _translated(templates, tokens) if templates else None


def _translated(template: str, tokens: Mapping[str, str | list[str]]) -> str:
    for tag, plain in _MARKS.items():
        template = re.sub(tag, plain, template)
    names = _names_in(template)
    # A begin or end token that the tokenizer lacks is nothing to transformers; others take the model's.
    values = {name: tokens.get(name) for name in sorted(names & (tokens.keys() - _GIVEN))}
    values |= dict.fromkeys(sorted(names & (_GIVEN - tokens.keys())), "")
    sets = "".join(f"{{%- set {name} = {json.dumps(value, ensure_ascii=False)} %}}" for name, value in values.items())
    # Behind a tag a line break and blanks before another tag would go; behind an expression they stay.
    return f'{sets}{{{{ "" }}}}{template}' if sets else template


def _names_in(template: str) -> set[str]:
    """Variables that ``template`` takes from outside."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    try:
        return meta.find_undeclared_variables(environment.parse(template))
    except TemplateSyntaxError as error:
        problem = f"is not Jinja (line {error.lineno}: {error.message})"
        raise InputError(
            "chat template", template[:80], problem, "Repair it, or remove it from the tokenizer"
        ) from None
