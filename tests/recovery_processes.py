"""Recoveries by several processes at once, as torchrun starts them: what tests run in each of them.

``python recovery_processes.py FOLDER JOBS``: every job of the JSON list JOBS is one recovery of FOLDER/pruned.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TESTS = Path(__file__).parent


@contextmanager
def started(count: int, *command: object) -> Iterator[list[subprocess.Popen]]:
    """So many processes of one job, each running Python with ``command``; all are gone at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    processes = []
    try:
        for rank in range(count):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(TESTS)}
            processes.append(
                subprocess.Popen(
                    [sys.executable, *map(str, command)], env=os.environ | shared | own, cwd="/",
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                )
            )  # fmt: skip
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def recovered_together(folder: Path, count: int, jobs: list[dict]) -> list[list[dict]]:
    """What every process has to tell about every job."""
    with started(count, __file__, folder, json.dumps(jobs)) as processes:
        answers = [process.communicate(timeout=300) for process in processes]
        assert all(process.returncode == 0 for process in processes), [errors[-2000:] for _, errors in answers]
    return [json.loads(out.splitlines()[-1]) for out, _ in answers]


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


if __name__ == "__main__":
    import torch

    from ppf import ranks

    torch.set_num_threads(1)
    ranks.start()
    found = [recovered(Path(sys.argv[1]), **job) for job in json.loads(sys.argv[2])]
    ranks.stop()
    print(json.dumps(found))
