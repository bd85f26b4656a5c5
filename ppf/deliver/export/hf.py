"""Hugging Face folders: a copy of the checkpoint, and on request the modelling code that opens it without PPF."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..._version import versions
from ...checkpoint import hashes
from ...checkpoint.headers import REPORT, read_json
from ...errors import InputError
from ...families import Family
from ...model import perlayer
from ...model.classes import plain_parts
from ...storage.files import new_directory, require_space, write_json, write_text
from ..standing import report_of
from ..standing import stands as result_stands
from .source import Source, check_destination, require_inside

# What belongs to a checkpoint. Code and pickles that may lie beside it are not taken along.
_SUFFIXES = {".json", ".safetensors", ".model", ".jinja", ".txt", ".md"}
_OTHER_FILES = 1 << 20
_AUTO_CLASSES = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
# What is added to ppf/model/perlayer.py: the classes of one family, made when the file is imported.
_FOOTER = """

# Written by `ppf export --to hf --self-contained`: the classes of this checkpoint.
from {modeling} import {imported}  # noqa: E402

make_classes(
    {name!r},
    {result_type!r},
    {{{stock}}},
    {parts!r},
    __name__,
)
"""


def to_hf(source: Source, output: str | Path, self_contained: bool = False, force: bool = False) -> dict[str, Any]:
    """Write ``source`` as a Hugging Face folder; returns what ``ppf.json`` says about the export.

    Opened by the Auto classes where PPF is installed, or, if uniform, by transformers alone. ``self_contained`` adds a
    file of modelling code and an ``auto_map``, for readers without PPF: they decide about ``trust_remote_code``, PPF
    itself never sets it. Uniform results need no code and get none. Raises ``InputError`` for ``self_contained``
    multimodal models.
    """
    facts = {"format": "hf", "self_contained": self_contained and not source.is_uniform}
    if not facts["self_contained"]:
        return write_copy(source, output, facts, force)
    if source.is_tower:
        problem = "multimodal models whose text tower is not uniform open only where PPF is installed"
        raise InputError("self-contained", True, problem, "Drop it, or prune with the same widths in all layers")
    module, name = f"modeling_{source.family.result_type}", _prefix(source.family)
    auto_map = {auto: f"{module}.{name}{kind}" for auto, kind in _AUTO_CLASSES.items()}
    return write_copy(
        source, output, facts, force, {"auto_map": auto_map}, {f"{module}.py": modelling_code(source.family)}
    )


def write_copy(
    source: Source,
    output: str | Path,
    facts: dict[str, Any],
    force: bool,
    changes: dict[str, Any] | None = None,
    code: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Copy the checkpoint with ``changes`` to its config, files of ``code`` ({name: text}), and a new report.

    A change to None removes the field. Raises ``InputError`` for an ``output`` that may not be written and for a full
    disk, before the first byte.
    """
    check_destination(source, output, force)
    if not force and stands(output, source, facts):
        return facts
    files = [file for file in sorted(source.folder.iterdir()) if file.is_file() and file.suffix in _SUFFIXES]
    require_inside(source.folder, files)
    with new_directory(output, force) as folder:
        require_space(output, sum(file.stat().st_size for file in files) + _OTHER_FILES)
        for file in files:
            if file.name not in (REPORT, "config.json"):
                shutil.copyfile(file, folder / file.name)
        config = read_json(source.folder / "config.json") | {"auto_map": None} | (changes or {})
        write_json(folder / "config.json", {name: value for name, value in config.items() if value is not None})
        for name, text in (code or {}).items():
            write_text(folder / name, text)
        write_report(folder, source, facts)
    return facts


def modelling_code(family: Family) -> str:
    """One module that makes the classes of a family's results; imports nothing but torch and transformers."""
    classes = {kind: family.class_name(kind) for kind in ("Config", "Model", "ForCausalLM", "DecoderLayer")}
    footer = _FOOTER.format(
        modeling=family.modeling,
        imported=", ".join(classes.values()),
        name=_prefix(family),
        result_type=family.result_type,
        stock=", ".join(f'"{kind}": {name}' for kind, name in classes.items()),
        parts=plain_parts(family),
    )
    return Path(perlayer.__file__).read_text(encoding="utf-8") + footer


def _prefix(family: Family) -> str:
    """What the names of the classes of results begin with."""
    return f"PPF{family.classes}"


def write_report(folder: Path, source: Source, facts: dict[str, Any]) -> None:
    """``ppf.json``: the source's own report, what the export did, and the SHA-256 of every file."""
    hashes.write_report(folder, _report(source, facts))


def stands(output: str | Path, source: Source, facts: dict[str, Any]) -> bool:
    """True if ``output`` holds this export of this source already."""
    found = report_of(output)
    return found is not None and result_stands(output, found, _report(source, facts))


def _report(source: Source, facts: dict[str, Any]) -> dict[str, Any]:
    about = facts | {"source": str(source.folder.resolve()), "contents": source.contents, "ppf": versions()["ppf"]}
    return source.report | {"export": about}
