"""lm_eval as PPF calls it: find the tasks before any work, score a loaded model, keep the figures."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...errors import InputError
from ...progress import Progress, silent
from .figures import data_of, outcome
from .finding import Finder, leaves

_OLDEST = "0.4.12"  # the first with TaskManager.load
_INSTALL = "Run: pip install 'ppf[eval]'"
_SEED = 1234  # lm_eval's own for few-shot examples
_BOOTSTRAPS = 100  # for standard errors that have no formula, such as a perplexity's; lm_eval's own number is 100,000


@dataclass(frozen=True)
class Tasks:
    """Tasks found and loaded: lm_eval's objects by the names under which they were asked for.

    ``limit`` is how many items of each are scored, the first ones, None for all; ``batch_size`` how many at a time.
    """

    found: dict[str, list[Any]]
    manager: Any
    limit: int | None
    batch_size: int

    @classmethod
    def open(
        cls,
        names: str | Sequence[str],
        folder: str | Path | None = None,
        limit: int | None = None,
        batch_size: int = 8,
    ) -> Tasks:
        """The tasks ``names`` (a sequence, or a text with commas): of ``folder``, else of lm_eval.

        A folder has item files as :mod:`ppf.fitting.tasks.files` describes, or lm_eval's own ``*.yaml``. lm_eval's
        tasks bring their data from the hub or its cache. Raises ``InputError`` if lm_eval is missing or too old, for a
        task that nobody knows, whose data cannot be had or that would run code, and for numbers below one.
        """
        listed = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
        for field, number in (("limit", limit), ("batch-size", batch_size)):
            if number is not None and (type(number) is not int or number < 1):
                raise InputError(field, number, "is not a number of items", "Use a whole number, at least 1")
        if not any(listed):
            raise InputError("tasks", names, "names no task", "Name some, such as arc_easy,hellaswag")
        require_lm_eval(listed)
        with _quietly():
            finder = Finder(None if folder is None else Path(folder))
            found = {name: finder.load(name) for name in listed if name}
        return cls(found, finder.manager, limit, batch_size)

    def check(self, context: int, resident: bool) -> None:
        """Raise ``InputError`` unless a model with so large a ``context`` (tokens) can be judged: for weights that are
        not ``resident`` on the device, and for a task whose answers alone would fill the context."""
        if not resident:
            remedy = "Use --weights gpu, a larger --gpu-memory-gb, or leave the tasks out"
            raise InputError("tasks", ",".join(self.found), "need all weights on the device, and these stream", remedy)
        for name, group in self.found.items():
            for task in leaves(group):
                longest = (task.get_config("generation_kwargs") or {}).get("max_gen_toks", 256)
                if task.OUTPUT_TYPE == "generate_until" and longest >= context:
                    problem = f"writes answers of up to {longest} tokens, and the model's context has {context}"
                    raise InputError("tasks", name, problem, "Leave this task out")

    def only(self, names: Collection[str]) -> Tasks:
        """Those of them that ``names`` has."""
        return replace(self, found={name: group for name, group in self.found.items() if name in names})

    def asked(self, name: str) -> dict[str, Any]:
        """What makes two answers to the task ``name`` comparable, as JSON: lm_eval's version, how many items, and of
        every task in it version, examples and data, wherever that lies."""
        parts = [
            {
                "task": task.task_name,
                "version": task.VERSION,
                "few_shot": task.config.num_fewshot,
                "data": {key: value for key, value in data_of(task).items() if key != "file"},
            }
            for task in leaves(self.found[name])
        ]
        return {"lm_eval": version("lm_eval"), "limit": self.limit, "tasks": parts}

    def score(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: Progress = silent
    ) -> dict[str, Any]:
        """What ``--json`` and ``ppf.json`` say under "tasks": for every task its figures with standard errors (None
        where there is none), the number of items scored and there are, few-shot examples, version and data.

        A group of lm_eval's comes with the tasks in it. Raises ``PPFError`` if the model gives NaN or infinities.
        """
        from lm_eval.models.huggingface import HFLM

        scored: dict[str, Any] = {}
        with _quietly():
            judged = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self.batch_size)
            for done, (name, group) in enumerate(self.found.items()):
                progress("tasks", done, len(self.found))
                scored |= outcome(name, group, self.results(group, judged))
        progress("tasks", len(self.found), len(self.found))
        return scored

    def results(self, group: list[Any], judged: Any) -> dict[str, Any]:
        """lm_eval's own results of tasks and groups for its model ``judged``, with every item under "samples"."""
        from lm_eval import simple_evaluate

        # What it would tell of this machine and its folder: seconds a task, a dozen programs, git's errors among them.
        untold = {"get_git_commit_hash": lambda: None, "add_env_info": lambda results: None}
        seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed"), _SEED)
        options = {"limit": self.limit, "bootstrap_iters": _BOOTSTRAPS, "fewshot_random_seed": _SEED}
        with patch.multiple("lm_eval.evaluator", create=True, **untold):
            return simple_evaluate(judged, tasks=group, task_manager=self.manager, **options, **seeds)


def require_lm_eval(asked: object) -> None:
    """Raise ``InputError`` unless lm_eval is there, with what it needs for transformers' models, and new enough."""
    try:
        import lm_eval.models.huggingface  # noqa: F401
        from packaging.version import Version
    except ImportError as error:
        problem = f"need lm_eval, and {(error.name or 'a part of it').split('.')[0]} is not installed"
        raise InputError("tasks", _listed(asked), problem, _INSTALL) from None
    found = version("lm_eval")
    if Version(found) < Version(_OLDEST):
        raise InputError("tasks", _listed(asked), f"need lm_eval {_OLDEST} or later; this is {found}", _INSTALL)


def _listed(asked: object) -> object:
    return ",".join(asked) if isinstance(asked, list) else asked


@contextmanager
def _quietly() -> Iterator[None]:
    """lm_eval without its own log and bars, ours say where it is; and without processes of its own, which it would fork
    from this one, threads and CUDA and all."""
    from tqdm import tqdm

    logger, drawn = logging.getLogger("lm_eval"), tqdm.__init__
    level, forks = logger.level, os.environ.get("DISABLE_MULTIPROC")

    def invisible(bar: Any, *arguments: Any, **options: Any) -> None:
        drawn(bar, *arguments, **options | {"disable": True})

    logger.setLevel(logging.ERROR)
    tqdm.__init__ = invisible
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with redirect_stdout(io.StringIO()):  # its prints would stand in front of --json
            yield
    finally:
        tqdm.__init__ = drawn
        if forks is None:
            del os.environ["DISABLE_MULTIPROC"]
        logger.setLevel(level)
