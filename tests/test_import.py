"""``import ppf``: quick, and everything it names is there."""

import os
import re
import subprocess
import sys

import fresh
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


NAMES = [command.name for command in app.registered_commands]


def test_importing_ppf_and_asking_for_help_load_neither_torch_nor_transformers():
    done = subprocess.run([sys.executable, "-c", _IMPORTS, *NAMES], capture_output=True, text=True)
    assert done.returncode == 0 and len(NAMES) == 14, done.stderr[-2000:]


def test_names_come_from_the_package_when_they_are_asked_for():
    for name in ppf.__all__:
        assert getattr(ppf, name) is not None
    assert ppf.PPFQwen3ForCausalLM.config_class is ppf.PPFQwen3Config
    for name in ("nothing", "PPFNothing"):
        with pytest.raises(AttributeError, match=name):
            getattr(ppf, name)


def test_help_shows_commands_in_groups_and_is_quick():
    """Wall time would be that of the other tests beside this one: processor time it is."""
    before, done = os.times(), subprocess.run([sys.executable, "-m", "ppf", "--help"], capture_output=True, text=True)
    after = os.times()
    use, judge = done.stdout.index("─ Use ─"), done.stdout.index("─ Judge ─")
    places = {name: re.search(rf"^│ {name} ", done.stdout, flags=re.MULTILINE).start() for name in NAMES}
    assert [name for name, at in sorted(places.items(), key=lambda item: item[1]) if at > judge] == [
        "report",
        "compare",
        "pareto",
        "bench",
        "profile",
    ]
    assert use < min(places.values()) == places["fit"]
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1


_WITHOUT = """
import sys
missing = sys.argv.pop(1)
for name in [name for name in sys.modules if name.split(".")[0] == missing]:
    del sys.modules[name]
sys.modules[missing] = None  # as if it were not installed
from ppf.cli import main
main()
"""


@pytest.mark.parametrize(
    ("command", "missing"), [("report", "matplotlib"), ("pareto", "matplotlib"), ("compare", "scipy")]
)
def test_lab_tools_say_what_to_install(tiny_run, tmp_path, command, missing):
    options = ["--text", tiny_run / "text.txt", "--output", tmp_path / "out"] if command == "compare" else []
    arguments = [missing, command, tiny_run / "run", *options]
    done = fresh.run(_WITHOUT, *arguments)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert missing in done.stderr and "pip install 'ppf[lab]'" in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_users_use_needs_no_lab_tools(tiny_run, tmp_path):
    """Negative control of the above: the same interpreter prunes."""
    arguments = ["matplotlib", "prune", tiny_run / "run", "--ratio", "0.3", "--output", tmp_path / "out"]
    done = fresh.run(_WITHOUT, *arguments, "--device", "cpu")
    assert done.returncode == 0 and (tmp_path / "out" / "ppf.json").exists()
