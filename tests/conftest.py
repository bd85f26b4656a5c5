"""What every test may use: skips for machines without a GPU or without the reference files, and a fixed seed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

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
