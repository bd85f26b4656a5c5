"""A model in memory becomes part of its run: RUN/model, so that the run can be used when the model is gone."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import checkpoint, ranks
from ..errors import InputError
from ..storage.files import check_output, temporary_sibling
from ..storage.leftovers import is_temporary_of
from ..storage.locks import is_lock, sweep
from .alone import may_write
from .run.directory import MODEL
from .run.manifest import MANIFEST


@contextmanager
def placed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, output: Path) -> Iterator[Path]:
    """A folder with ``model`` and ``tokenizer``, RUN/model of the run ``output`` unless that has begun already: then a
    copy that is there to be compared, and goes.

    Nothing is left of it if the fit is refused. The caller holds the run's lock. Raises ``InputError`` without a
    tokenizer, and if ``output`` is neither new nor a run. Of several processes the first one writes.
    """
    if tokenizer is None:
        problem = "is missing: a model in memory has none, and texts and results need one"
        raise InputError("tokenizer", None, problem, "Give tokenizer=AutoTokenizer.from_pretrained(...)")
    made = Path(ranks.from_first(lambda: str(_write(model, tokenizer, output))))
    try:
        yield made
    finally:
        if ranks.first():  # not together: it may be only this one that failed
            _clear(made, output)


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output: Path) -> Path:
    begun, home = (output / MANIFEST).exists(), output / MODEL
    if not begun and not home.exists():
        if output.is_dir() and all(_unfinished_start(file.name) for file in output.iterdir()):
            sweep(output)
        check_output(output)
        checkpoint.save_model(model, tokenizer, home)
        return home
    # Beside the run's own, where there is room for it; into some finished runs nothing can be written.
    copy = temporary_sibling(home) if may_write(output) else Path(tempfile.mkdtemp(prefix="ppf-model-"))
    checkpoint.save_model(model, tokenizer, copy)
    if begun or checkpoint.fingerprint(home) != checkpoint.fingerprint(copy):
        return copy
    shutil.rmtree(copy)  # a fit of this model was killed before it had begun
    return home


def _unfinished_start(file: str) -> bool:
    return is_lock(file, MODEL) or is_temporary_of(file, MODEL)


def _clear(made: Path, output: Path) -> None:
    if made != output / MODEL:
        shutil.rmtree(made, ignore_errors=True)
    elif not (output / MANIFEST).exists():
        shutil.rmtree(made, ignore_errors=True)
        with suppress(OSError):  # not empty: somebody else's
            output.rmdir()
