"""transformers knows ``ppf_llama`` where PPF is installed, in every order of imports and at no cost to others."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from export_cases import python, write_random

from ppf.families import families
from ppf.fitting.family_check import tiny_config
from ppf.model.build import pruned_config
from ppf.model.policy import Policy

REPOSITORY = Path(__file__).parents[1]
# What `import torch` does where ppf is installed, at different moments.
_MOMENTS = {
    "with torch": "import torch; {hook}; {hook}; from transformers import AutoConfig, AutoModelForCausalLM",
    "before torch": "{hook}; from transformers import AutoConfig, AutoModelForCausalLM; import torch",
    "after transformers": "from transformers import AutoConfig, AutoModelForCausalLM; {hook}",
}
_OPEN = """
import sys
sys.path.append({repository!r})
{order}
early = "ppf" in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
from transformers.models.auto import auto_mappings
print(early, type(AutoConfig.from_pretrained(sys.argv[1])).__module__, type(model).__name__)
print(type(auto_mappings.__loader__).__name__, auto_mappings.__spec__.loader is auto_mappings.__loader__)
"""


def entry_point() -> EntryPoint:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    ((name, value),) = project["entry-points"]["torch.backends"].items()
    return EntryPoint(name, value, "torch.backends")


@pytest.mark.parametrize("moment", _MOMENTS)
def test_results_open_without_importing_ppf(moment, tmp_path):
    folder = write_random(tmp_path / "in", Policy([3, 0, 2, 1], [64, 16, 0, 40]))
    hook = f"import {entry_point().module}; {entry_point().module}.{entry_point().attr}()"
    done = python(_OPEN.format(repository=str(REPOSITORY), order=_MOMENTS[moment].format(hook=hook)), folder)
    assert done.returncode == 0, done.stderr
    opened, left = done.stdout.splitlines()
    assert opened == "False ppf.model.classes PPFLlamaForCausalLM"
    assert left == "SourceFileLoader True"  # the table's module is as it was


def test_results_of_every_family_are_known(tmp_path):
    """Each by its own configuration class, and PPF imported only when the first one is opened."""
    for family in families():
        groups = (3, 3, 0) if family.attention.whole else (3, 1, 0)
        pruned_config(tiny_config(family), Policy(groups, [10, 0, 4])).save_pretrained(tmp_path / family.model_type)
    names = [family.model_type for family in families()]
    hook = f"import {entry_point().module}; {entry_point().module}.{entry_point().attr}()"
    code = (
        f"import sys; sys.path.append({str(REPOSITORY)!r}); {hook}; from transformers import AutoConfig\n"
        "print('ppf' in sys.modules)\n"
        "for name in sys.argv[2:]:\n"
        "    config = AutoConfig.from_pretrained(sys.argv[1] + '/' + name)\n"
        "    print(config.model_type, type(config).__name__, config.layer_widths()[2])\n"
    )
    done = python(code, tmp_path, *names)
    assert done.returncode == 0, done.stderr
    expected = [f"ppf_{family.model_type} PPF{family.classes}Config (0, 0, 4)" for family in families()]
    assert done.stdout.splitlines() == ["False", *expected]


def test_it_imports_only_the_standard_library():
    code = (
        f"import sys; sys.path.append({str(REPOSITORY)!r}); import {entry_point().module} as a; a.register()\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'ppf', 'torch', 'transformers', 'numpy'}))"
    )
    assert python(code).stdout.strip() == "[]"


_AS_TORCH = """
import sys
sys.path[:] = [{folder!r}, *(path for path in sys.path if "site-packages" not in path)]
from importlib.metadata import EntryPoint
EntryPoint("ppf", {value!r}, "torch.backends").load()()  # torch lets no exception of it pass
"""
_AUTO = "transformers/models/auto"
# Other transformers than those that we know, and what a process may do with them.
_OTHERS = {
    "absent": ({}, "try:\n    import transformers\nexcept ModuleNotFoundError:\n    print('fine')"),
    "old": (
        {"configuration_auto.py": "CONFIG_MAPPING_NAMES = {'llama': 'LlamaConfig'}"},
        "from transformers.models.auto import configuration_auto as c; print('fine' if c.CONFIG_MAPPING_NAMES else '')",
    ),
    "another table": (
        {"auto_mappings.py": "CONFIG_MAPPING_NAMES = ('llama',)"},
        "from transformers.models.auto.auto_mappings import CONFIG_MAPPING_NAMES as n; print('fine' if n[0] else '')",
    ),
    "no table": (
        {"auto_mappings.py": "x = 1"},
        "from transformers.models.auto import auto_mappings as a; print('fine' if a.x else '')",
    ),
    "half broken": (
        {"auto_mappings.py": "import nowhere_at_all"},
        "try:\n    import transformers.models.auto.auto_mappings\nexcept ModuleNotFoundError as e:\n"
        "    print('fine' if e.name == 'nowhere_at_all' else e)",
    ),
    "blocked": ({}, "sys.modules['transformers.models.auto.auto_mappings'] = None; hook(); print('fine')"),
    "a refusing module": (
        {"configuration_auto.py": "def __getattr__(name): raise ImportError(name)"},
        "import transformers.models.auto.configuration_auto; hook(); print('fine')",
    ),
    "another finder that fails": (
        {},
        "class F:\n    def find_spec(self, *_): raise ValueError\nsys.meta_path.insert(0, F()); hook(); print('fine')",
    ),
}


def in_bare_python(code: str, folder: Path, **environment: str) -> str:
    """What ``code`` prints after torch's call of our hook, in a process that finds nothing but what is in ``folder``,
    where ppf_autoload lies without PPF."""
    shutil.copytree(REPOSITORY / "ppf_autoload", folder / "ppf_autoload")
    start = _AS_TORCH.format(folder=str(folder), value=entry_point().value)
    code = f"{start}from ppf_autoload import register as hook\n{code}"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, env=os.environ | environment, cwd=folder
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("other", _OTHERS)
def test_nothing_of_others_is_broken(other, tmp_path):
    files, code = _OTHERS[other]
    for name, text in files.items():
        (tmp_path / _AUTO).mkdir(parents=True, exist_ok=True)
        (tmp_path / _AUTO / name).write_text(text)
    assert in_bare_python(code, tmp_path) == "fine"


def test_results_without_ppf_say_that_it_is_missing(tmp_path):
    (tmp_path / "transformers/models").mkdir(parents=True)
    code = "try:\n    import transformers.models.ppf_llama\nexcept ModuleNotFoundError as e:\n    print(e.name)"
    assert in_bare_python(code, tmp_path) == "ppf"


def test_it_is_turned_off(tmp_path):
    code = "print([type(f).__module__ for f in sys.meta_path if 'ppf' in type(f).__module__])"
    assert in_bare_python(code, tmp_path, PPF_AUTOLOAD="0") == "[]"


def test_it_takes_no_time_to_speak_of():
    """0.1 ms are promised; importing compiled code and registering is measured, ten times over on busy machines."""
    code = compile((REPOSITORY / "ppf_autoload/__init__.py").read_text(), "autoload", "exec")

    def once() -> float:
        before, start = sys.meta_path[:], time.perf_counter()
        names = {"__name__": "autoload"}
        exec(code, names)
        names["register"]()
        spent = time.perf_counter() - start
        sys.meta_path[:] = before
        return spent

    assert min(once() for _ in range(50)) < 1e-3
