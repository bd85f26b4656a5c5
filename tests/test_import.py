"""``import ppf``: quick, and everything it names is there."""

import subprocess
import sys

import pytest

import ppf
from ppf.cli import app

_IMPORTS = """
import sys
import ppf, ppf.families
assert ppf.InputError and ppf.families.family_of("qwen3") and "Run" in dir(ppf)
from ppf.cli import app
for arguments in (["--help"], ["--version"], *([name, "--help"] for name in sys.argv[1:])):
    try:
        app(arguments, prog_name="ppf")
    except SystemExit as stop:
        assert stop.code == 0
heavy = [name for name in ("torch", "transformers", "numpy", "safetensors") if name in sys.modules]
assert not heavy, heavy
"""


def test_importing_ppf_and_asking_for_help_load_neither_torch_nor_transformers():
    names = [command.name for command in app.registered_commands]
    done = subprocess.run([sys.executable, "-c", _IMPORTS, *names], capture_output=True, text=True)
    assert done.returncode == 0 and len(names) == 14, done.stderr[-2000:]


def test_names_come_from_the_package_when_they_are_asked_for():
    for name in ppf.__all__:
        assert getattr(ppf, name) is not None
    assert ppf.PPFQwen3ForCausalLM.config_class is ppf.PPFQwen3Config
    for name in ("nothing", "PPFNothing"):
        with pytest.raises(AttributeError, match=name):
            getattr(ppf, name)
