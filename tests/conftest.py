"""What every test may use: skips for machines without a GPU or without the reference files, and a fixed seed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from factories import one_thread as single_threaded
from factories import quick_learning, write_checkpoint, write_text

import ppf

REPOSITORY = Path(__file__).resolve().parent.parent
REFERENCE = Path(os.environ.get("PPF_REFERENCE", REPOSITORY.parent / "shared")).resolve()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skips = {}
    if not torch.cuda.is_available():
        skips["gpu"] = pytest.mark.skip(reason="no CUDA device")
    if not (REFERENCE / "models" / "ref-14m").is_dir():
        skips["reference"] = pytest.mark.skip(reason=f"no reference files in {REFERENCE} (set PPF_REFERENCE)")
    for item in items:
        for marker, skip in skips.items():
            if item.get_closest_marker(marker):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, alone or in any order."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def reference() -> Path:
    """Folder with ``models/`` and ``text/``; only for tests marked ``reference``."""
    return REFERENCE


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One torch thread, for a module's fixtures too; see :func:`factories.one_thread`."""
    with single_threaded():
        yield


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """A finished run of a tiny grouped-query model: ``model``, ``text.txt`` and ``run`` in one folder. Do not change
    it; copy it (``shutil.copytree``) to damage or extend it."""
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder / "model")
    write_text(folder / "text.txt")
    settings = ppf.Settings(evaluations=40, ffn_multiple=8, sequence_length=32, calibration_tokens=2048)
    with single_threaded(), pytest.MonkeyPatch.context() as patch:
        quick_learning(patch)
        ppf.fit(folder / "model", folder / "text.txt", folder / "run", settings=settings, device="cpu")
    return folder
