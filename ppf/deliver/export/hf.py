"""Hugging Face folders: a copy of the checkpoint, and on request the modelling code that opens it without PPF."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path
from typing import Any

from ... import model as models
from ...checkpoint.checks import REPORT
from ...checkpoint.hashes import hash_folder
from ...checkpoint.headers import read_json
from ...files import new_directory, require_space, write_json, write_text
from .source import Source, check_destination

# What belongs to a checkpoint. Code and pickles that may lie beside it are not taken along.
_SUFFIXES = {".json", ".safetensors", ".model", ".jinja", ".txt", ".md"}
_OTHER_FILES = 1 << 20
# PPF's own modules, renamed as transformers names such files.
_CODE = {"configuration": "configuration_ppf_llama", "modeling": "modeling_ppf_llama"}
_AUTO_MAP = {
    "AutoConfig": "configuration_ppf_llama.PPFLlamaConfig",
    "AutoModel": "modeling_ppf_llama.PPFLlamaModel",
    "AutoModelForCausalLM": "modeling_ppf_llama.PPFLlamaForCausalLM",
}


def to_hf(source: Source, output: str | Path, self_contained: bool = False, force: bool = False) -> dict[str, Any]:
    """Write ``source`` as a Hugging Face folder; returns what ``ppf.json`` says about the export.

    Opened by ``AutoModelForCausalLM`` after ``import ppf``, or, if uniform, by transformers alone. ``self_contained``
    adds the two modelling files and an ``auto_map``, for readers without PPF: they decide about
    ``trust_remote_code``, PPF itself never sets it. Uniform results need no code and get none.
    """
    facts = {"format": "hf", "self_contained": self_contained and not source.is_uniform}
    if not facts["self_contained"]:
        return write_copy(source, output, facts, force)
    return write_copy(source, output, facts, force, {"auto_map": _AUTO_MAP}, modelling_code())


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
    files = [file for file in sorted(source.folder.iterdir()) if file.is_file() and file.suffix in _SUFFIXES]
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


def modelling_code() -> dict[str, str]:
    """PPF's configuration and modelling modules, importing each other under their new names and nothing else of PPF."""
    home, files = Path(models.__file__).parent, {}
    for module, name in _CODE.items():
        text = _alone((home / f"{module}.py").read_text(encoding="utf-8"))
        for other, renamed in _CODE.items():
            text = text.replace(f"from .{other} import", f"from .{renamed} import")
        files[f"{name}.py"] = text
    return files


def _alone(code: str) -> str:
    """``code`` without the methods that import from the rest of PPF: its runtime does not come with a folder."""
    lines = code.splitlines(keepends=True)
    for cls in reversed([node for node in ast.parse(code).body if isinstance(node, ast.ClassDef)]):
        for method in reversed([node for node in cls.body if isinstance(node, ast.FunctionDef)]):
            if any(isinstance(node, ast.ImportFrom) and node.level > 1 for node in ast.walk(method)):
                first = min([method.lineno, *(decorator.lineno for decorator in method.decorator_list)])
                del lines[first - 2 : method.end_lineno]  # with the blank line above
    return "".join(lines)


def write_report(folder: Path, source: Source, facts: dict[str, Any]) -> None:
    """``ppf.json``: the source's own report, what the export did, and the SHA-256 of every file."""
    about = facts | {"source": str(source.folder.resolve())}
    write_json(folder / REPORT, {**source.report, "export": about, "files": hash_folder(folder)})
