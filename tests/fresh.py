"""New processes without the seconds that imports take: forks of one that has imported what every command needs, and has
seen nothing of any test.

For what wants a process of its own, such as signals, pipes, or a memory that does not know the model. What is said
about starting Python, importing PPF or reading the environment needs ``subprocess``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parent
_BEFORE = dict(os.environ)  # any test
_ONE_AT_A_TIME = threading.Lock()
COMMAND = "from ppf.cli import main; main()"
"""The code of ``ppf``: its words are the arguments."""


class Process:
    """A fork that runs Python ``code`` with ``arguments`` as ``sys.argv[1:]``, in the folder ``/``."""

    def __init__(self, code: str, *arguments: object, stdin: str | Path = os.devnull, **environment: str):
        self._folder = tempfile.TemporaryDirectory(prefix="ppf-fresh-")
        self._files = [Path(self._folder.name) / name for name in ("out", "err")]
        for file in self._files:
            file.touch()
        paths = [str(stdin), *map(str, self._files)]
        job = {"code": code, "argv": list(map(str, arguments)), "paths": paths, "environment": environment}
        self.pid: int = _asked(job)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code, minus the number of the signal that ended it, None while it runs."""
        if self.returncode is None:
            self.returncode = _asked({"pid": self.pid})
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def ended(self, within: float = 300) -> subprocess.CompletedProcess[str]:
        """Wait for its end, and kill it after so many seconds; how it ended, and what it wrote."""
        deadline = time.monotonic() + within
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.send_signal(signal.SIGKILL)
            time.sleep(0.01)
        out, err = (file.read_text(errors="replace") for file in self._files)
        self._folder.cleanup()
        return subprocess.CompletedProcess((), self.returncode, out, err)


def run(code: str, *arguments: object, stdin: str | Path = os.devnull, **environment: str):
    """What ``subprocess.run`` gives for Python ``code``."""
    return Process(code, *arguments, stdin=stdin, **environment).ended()


def in_its_place(command: list[str], **options) -> subprocess.CompletedProcess[str]:
    """What ``subprocess.run`` gives for ``python -c CODE ...`` or ``python -m ppf ...``: to put in its place."""
    (how, code), arguments = command[1:3], command[3:]
    assert how == "-c" or (how, code) == ("-m", "ppf")
    return run(code if how == "-c" else COMMAND, *arguments)


def _asked(job: dict) -> int | None:
    with _ONE_AT_A_TIME:
        server = _server()
        print(json.dumps(job), file=server.stdin, flush=True)
        return json.loads(server.stdout.readline())


@cache
def _server() -> subprocess.Popen:
    """It ends when this process does: there is nothing more to read then."""
    environment = _BEFORE | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, __file__], env=environment, cwd="/", **pipes)


def _serve() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        if "code" in job:
            answer = os.fork()
            if answer == 0:
                _live(job)
        else:
            pid, status = os.waitpid(job["pid"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), flush=True)


def _live(job: dict) -> None:
    """Run the job's code as a new interpreter would, to its end."""
    import traceback

    code = 1
    try:
        for number, path in enumerate(job["paths"]):
            os.dup2(os.open(path, os.O_WRONLY if number else os.O_RDONLY), number)
        sys.stdin = os.fdopen(0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ |= job["environment"]
        sys.argv = ["-c", *job["argv"]]
        exec(compile(job["code"], "<string>", "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _import_all() -> None:
    """What nearly every command imports."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    import ppf.cli
    import ppf.deliver.api
    import ppf.fitting.stages  # noqa: F401

    torch.set_num_threads(1)


if __name__ == "__main__":
    _import_all()
    _serve()
