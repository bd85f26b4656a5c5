"""Recoveries by several processes at once, which are told what torchrun tells its own: what tests run in each."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from ranks_cases import forked_together

CODE = "import sys, recovery_processes; recovery_processes.run(*sys.argv[1:])"
"""What each process runs: its words are a folder and a JSON list of recoveries of FOLDER/pruned."""


def recovered_together(folder: Path, count: int, jobs: list[dict]) -> list[list[dict]]:
    """What every process has to tell about every job."""
    ended = forked_together(count, CODE, folder, json.dumps(jobs))
    return [json.loads(done.stdout.splitlines()[-1]) for done in ended]


def run(folder: str, jobs: str) -> None:
    """What each of the processes does."""
    from ppf import ranks

    ranks.start()
    found = [recovered(Path(folder), **job) for job in json.loads(jobs)]
    ranks.stop()
    print(json.dumps(found))


def recovered(folder: Path, name: str, device: str, pause: float | None = None, **settings) -> dict:
    """Recover FOLDER/pruned to FOLDER/``name``: losses, report, and the share of what is trained. With a ``pause`` it
    saves after every step, and pauses then."""
    from ppf import InputError, ranks
    from ppf.deliver.recovery import RecoverySettings, recover, training

    told = {}

    class Told(training.Training):
        def run(self, teacher, progress):
            told["own"] = sum(_own(parameter).numel() for parameter in self.student.trained.values())
            told["all"] = sum(parameter.numel() for parameter in self.student.trained.values())
            told["losses"] = super().run(teacher, progress)
            return told["losses"]

        def _save(self):
            super()._save()
            time.sleep(pause or 0)

    seconds, share = training._SAVE_SECONDS, training._SAVE_SHARE
    if pause is not None:
        training._SAVE_SECONDS, training._SAVE_SHARE = 0.0, float("inf")
    module = sys.modules["ppf.deliver.recovery.recover"]
    module.Training, usual = Told, module.Training
    try:
        report = recover(
            folder / "pruned", folder / "text.txt", folder / name, settings=RecoverySettings(**settings),
            teacher=folder / "dense", device=device,
        )  # fmt: skip
        told |= {"report": report}
    except InputError as error:
        told |= {"refused": str(error)}
    finally:
        training._SAVE_SECONDS, training._SAVE_SHARE, module.Training = seconds, share, usual
    return told | {"rank": ranks.rank()}


def _own(parameter):
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
