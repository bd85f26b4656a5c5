"""lm_eval as PPF calls it: find the tasks before any work, score a loaded model, keep the figures."""

from __future__ import annotations

import difflib
import io
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...errors import InputError, PPFError
from ...progress import Progress, silent
from .files import file_config, task_files

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
            finder = _Finder(None if folder is None else Path(folder))
            found = {name: finder.load(name) for name in listed if name}
        return cls(found, finder.manager, limit, batch_size)

    def check(self, context: int, resident: bool) -> None:
        """Raise ``InputError`` unless a model with so large a ``context`` (tokens) can be judged: for weights that are
        not ``resident`` on the device, and for a task whose answers alone would fill the context."""
        if not resident:
            remedy = "Use --weights gpu, a larger --gpu-memory-gb, or leave the tasks out"
            raise InputError("tasks", ",".join(self.found), "need all weights on the device, and these stream", remedy)
        for name, group in self.found.items():
            for task in _leaves(group):
                longest = (task.get_config("generation_kwargs") or {}).get("max_gen_toks", 256)
                if task.OUTPUT_TYPE == "generate_until" and longest >= context:
                    problem = f"writes answers of up to {longest} tokens, and the model's context has {context}"
                    raise InputError("tasks", name, problem, "Leave this task out")

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
                scored |= self._outcome(name, group, judged)
        progress("tasks", len(self.found), len(self.found))
        return scored

    def _outcome(self, name: str, group: list[Any], judged: Any) -> dict[str, Any]:
        data = self.results(group, judged)
        for samples in data["samples"].values():
            _require_finite(name, samples)
        leaves = {task.task_name: task for task in _leaves(group)}
        return {
            key: _figures(name, values) | _facts(key, values, data, leaves.get(key))
            for key, values in data["results"].items()
        }

    def results(self, group: list[Any], judged: Any) -> dict[str, Any]:
        """lm_eval's own results of tasks and groups for its model ``judged``, with every item under "samples"."""
        from lm_eval import simple_evaluate

        seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed"), _SEED)
        options = {"limit": self.limit, "bootstrap_iters": _BOOTSTRAPS, "fewshot_random_seed": _SEED}
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


class _Finder:
    """Where tasks are looked for: item files, lm_eval's configurations beside them, then lm_eval itself."""

    def __init__(self, folder: Path | None) -> None:
        from lm_eval.tasks import TaskManager

        self.folder, self.files = folder, {} if folder is None else task_files(folder)
        self._own = TaskManager(include_path=None if folder is None else str(folder), include_defaults=False)
        self._all: TaskManager | None = None

    def load(self, name: str) -> list[Any]:
        """lm_eval's objects of one name: a task, a group, or the tasks that a tag is for."""
        if name in self._own.all_subtasks:
            loaded = _loaded(name, self._own, name)
        elif name in self.files:
            loaded = _loaded(name, self._own, file_config(name, self.files[name]))
        elif name in self._everything().all_tasks:  # the folder's groups too, which may name lm_eval's tasks
            loaded = _loaded(name, self._everything(), name)
        else:
            raise self._unknown(name)
        for task in _leaves(loaded):
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                problem = "runs code that a model wrote, or shows it pictures"
                raise InputError("tasks", name, problem, "Run lm_eval itself for it; docs/tasks.md says how")
        return loaded

    @property
    def manager(self) -> Any:
        """Of lm_eval's managers the least that knows what was loaded."""
        return self._own if self._all is None else self._all

    def _everything(self) -> Any:
        """Reads thousands of files: once, when first needed."""
        from lm_eval.tasks import TaskManager

        if self._all is None:
            self._all = TaskManager(include_path=None if self.folder is None else str(self.folder))
        return self._all

    def _unknown(self, name: str) -> InputError:
        known = {*self.files, *self._everything().all_tasks}
        near = difflib.get_close_matches(name, sorted(known), 4)
        where = "" if self.folder is None else f", nor in {self.folder}"
        remedy = f"Use {' or '.join(near)}" if near else "`lm_eval ls tasks` lists them"
        return InputError("tasks", name, f"is not a task of lm_eval{where}", remedy)


def _loaded(name: str, manager: Any, spec: str | dict[str, Any]) -> list[Any]:
    """lm_eval's objects for ``spec``; it fetches their data now. What fails there is a matter of hub, cache or file."""
    try:
        data = manager.load([spec])
    except ImportError as error:
        raise InputError("tasks", name, f"needs the package {error.name}", f"Run: pip install {error.name}") from None
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        remedy = "Have the hub within reach once, for its cache, or give the items in --task-folder"
        raise InputError("tasks", name, f"has data that cannot be had ({reason})", remedy) from None
    group = data["groups"].get(name)
    return list(data["tasks"].values()) if group is None else [group]


def _leaves(group: list[Any]) -> list[Any]:
    """The tasks themselves."""
    return [task for one in group for task in (one.get_all_tasks() if hasattr(one, "get_all_tasks") else [one])]


def _figures(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """lm_eval's "acc,none" and "acc_stderr,none", together under "acc"; a filter's name stays with the figure."""
    figures = {}
    for key, value in values.items():
        figure, _, filtered = key.partition(",")
        if not filtered or figure.endswith("_stderr"):
            continue
        if not math.isfinite(value):
            raise PPFError(f"task {name}: {figure} comes to {value}. Try --dtype float32")
        error = values.get(f"{figure}_stderr,{filtered}")
        known = isinstance(error, (int, float)) and math.isfinite(error)
        label = figure if filtered == "none" else f"{figure} ({filtered})"
        figures[label] = {"value": float(value), "stderr": float(error) if known else None}
    return {"figures": figures}


def _facts(key: str, values: dict[str, Any], data: dict[str, Any], task: Any) -> dict[str, Any]:
    """What a figure can only be compared with if it is the same. ``task`` is None for a group."""
    if task is None:
        return {"items": values.get("sample_len"), "group_of": data["group_subtasks"].get(key, [])}
    counts = data["n-samples"][key]
    own = (task.config.metadata or {}).get("data")
    return {
        "items": counts["effective"],
        "items_there_are": counts["original"],
        "few_shot": data["n-shot"][key],
        "version": data["versions"].get(key),
        "data": own or {"dataset": task.config.dataset_path, "name": task.config.dataset_name},
    }


def _require_finite(name: str, samples: list[dict[str, Any]]) -> None:
    """A choice between NaNs is no choice, and looks like one."""
    for sample in samples:
        for answer in (answer for answers in sample["resps"] for answer in answers):
            likelihood = answer[0] if isinstance(answer, tuple) else answer
            if isinstance(likelihood, float) and math.isnan(likelihood):
                raise PPFError(f"task {name}: the model gives NaN in this dtype. Try --dtype float32")


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
