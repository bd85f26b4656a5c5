"""Does a wheel work where nothing of this repository is? Used by `make wheel` and by cibuildwheel.

python dev/check_wheel.py                      # the ppf that this interpreter has
python dev/check_wheel.py WHEEL --torch DIR    # WHEEL in a new environment, which finds torch and others in DIR
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

# Named, and not the repository's: it is where the installed package says it is. Torch is not imported by any of it.
_NATIVE = """
import sys, ppf, ppf._C as native
assert "torch" not in sys.modules
print(ppf.__path__[0], native.__file__)
"""
_QUICK = "--sequence-length", "128", "--tokens", "4096", "--device", "cpu", "--json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", nargs="?", type=Path)
    parser.add_argument("--torch", type=Path, help="site-packages with what ppf depends on")
    asked = parser.parse_args()
    if asked.wheel is None:
        check(sys.executable, computes=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        python = installed(asked.wheel.resolve(), Path(folder), asked.torch)
        check(python, computes=asked.torch is not None)
    print(f"{asked.wheel}: installs, helps{' and evaluates' if asked.torch else ''}")


def installed(wheel: Path, folder: Path, torch: Path | None) -> str:
    """The interpreter of a new environment in ``folder`` with ``wheel`` and what its command line needs."""
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    for packages in (("typer", "rich"), ("--no-deps", str(wheel))):
        run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages, at=folder)
    if torch is not None:
        # Behind the environment's own packages; the .pth files in there, an editable ppf's among them, do not count.
        site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", at=folder).strip()
        Path(site, "others.pth").write_text(f"{torch.resolve()}\n", encoding="utf-8")
    return python


def check(python: str, computes: bool) -> None:
    """The package is whole, its native module loads, help comes; if it ``computes``, so does an evaluation."""
    with tempfile.TemporaryDirectory() as elsewhere:
        at = Path(elsewhere)
        package, native = run(python, "-c", _NATIVE, at=at).split()
        repository = Path(__file__).resolve().parents[1]
        assert repository not in Path(package).parents and Path(native).parent == Path(package), (package, native)
        for file in ("data/tiny-2m/config.json", "data/sample.txt", "kernels/grouped.py"):
            assert (Path(package) / file).is_file(), f"{file} is not in the wheel"
        command = str(Path(python).with_name("ppf"))
        assert " fit " in run(command, "--help", at=at)
        if computes:
            model, text = Path(package, "data", "tiny-2m"), Path(package, "data", "sample.txt")
            found = json.loads(run(command, "eval", str(model), "--text", str(text), *_QUICK, at=at))
            assert 1 < found["perplexity"] < 30, found


def run(*command: str, at: Path) -> str:
    """What ``command`` prints, run in ``at``; its errors end this program."""
    done = subprocess.run(command, cwd=at, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    main()
