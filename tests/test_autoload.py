"""transformers knows ``ppf_llama`` where PPF is installed, in every order of imports and at no cost to others."""

from __future__ import annotations

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
