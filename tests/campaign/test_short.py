"""The short pass of the campaign: a few tries of every attack, none of which may be a fault."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from campaign.attacks import ATTACKS
from campaign.outcomes import FINE

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="the shim of the campaign is C")


@pytest.fixture(scope="module")
def tries(repository, tmp_path_factory):
    """Every try of the short pass; a process of its own, whose children are forks."""
    file = tmp_path_factory.mktemp("campaign") / "tries.jsonl"
    command = [sys.executable, "-m", "tests.campaign", "--short", "--tries", file]
    ended = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert file.exists(), ended.stderr
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("attack", ATTACKS)
def test_every_try_ends_in_success_or_one_line(attack, tries):
    mine = [one for one in tries if one["attack"] == attack]
    assert len(mine) == ATTACKS[attack].short
    faults = [one for one in mine if one["outcome"] not in FINE]
    told = [
        f"{one['outcome']}: {one['what']}: {one['detail']} (--only {attack} --seed {one['seed']})" for one in faults
    ]
    assert not faults, "\n".join(told)
