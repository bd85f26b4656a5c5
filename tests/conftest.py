"""What every test may use: skips for machines without a GPU or without the reference files, and a fixed seed.

Short to import: the kernels' tests start processes that need torch and nothing else of what tests are made of.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch is imported, and for the processes that tests start: tiny models are slower on two threads than on one,
# by far where as many test processes as there are cores wait for each other's.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import ppf

REPOSITORY = Path(__file__).resolve().parent.parent
REFERENCE = Path(os.environ.get("PPF_REFERENCE", REPOSITORY.parent / "shared")).resolve()

# Files that take a minute, those that take most of it first: one that begins at the end leaves a core idle. (In this
# order with --no-loadscope-reorder, which otherwise begins with the files of the most tests.)
_LONG = (
    *("test_short", "test_demo", "test_docs", "test_ranks", "test_families", "test_texts", "test_cli"),
    *("test_sources", "test_together", "test_grouped", "test_decode", "test_recovery", "test_recovery_ranks"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(_LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(_LONG)))
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
    from factories import one_thread

    with one_thread():
        yield


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """A finished run of a tiny grouped-query model: ``model``, ``text.txt`` and ``run`` in one folder. Do not change
    it; copy it (``shutil.copytree``) to damage or extend it."""
    from factories import one_thread, quick_learning, write_checkpoint, write_text

    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder / "model")
    write_text(folder / "text.txt")
    settings = ppf.Settings(evaluations=40, ffn_multiple=8, sequence_length=32, calibration_tokens=2048)
    with one_thread(), pytest.MonkeyPatch.context() as patch:
        quick_learning(patch)
        ppf.fit(folder / "model", folder / "text.txt", folder / "run", settings=settings, device="cpu")
    return folder
