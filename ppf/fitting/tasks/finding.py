"""Where tasks come from: a folder's item files, lm_eval's configurations beside them, then lm_eval itself."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from ...errors import InputError
from .files import file_config, task_files


class Finder:
    """Finds the tasks of ``folder``, else of lm_eval. Raises ``InputError`` if the folder is not there."""

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
        for task in leaves(loaded):
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


def leaves(group: list[Any]) -> list[Any]:
    """The tasks themselves."""
    return [task for one in group for task in (one.get_all_tasks() if hasattr(one, "get_all_tasks") else [one])]


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
