"""The documentation: every command on every page is run or at least understood, and links lead somewhere.

A fenced block marked ``sh`` (or unmarked, starting with a command) is run line by line on the bundled model, with the
smaller settings of ``QUICK``, in a folder that holds MODEL, calibration.txt and test.txt; ``python`` blocks are run
there. Words after the language: ``gpu`` or ``7b`` (parsed, not run), ``install`` (checked against the build files), a
file name (the block becomes that file).
"""

import ast
import importlib.util
import json
import re
import runpy
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from cli_cases import ppf
from factories import quick_learning

from ppf import families
from ppf.cli import app
from ppf.fitting.run import Run
from ppf.lab import report as report_card

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.glob("*.md") if path.name not in ("api.md", "benchmarks.md"))
COMMANDS = typer.main.get_command(app).commands

# Appended to what a page says: later options win.
QUICK = {
    "fit": "--device cpu --evaluations 24 --sequence-length 64 --calibration-tokens 2048 --evaluation-tokens 512",
    "eval": "--device cpu --sequence-length 64 --tokens 512",
    "generate": "--device cpu --max-new-tokens 4",
    "recover": "--device cpu --tokens 1024 --sequence-length 64 --batch-tokens 512",
    "compare": "--device cpu --methods uniform,flap --ratios 0.3 --tokens 1024",
    "prune": "--device cpu",
    "profile": "--device cpu --prefill 16 --decode 16",
    "report": "--device cpu --held-out 20",
    "bench": "--device cpu --prompt 8 --new-tokens 32 --prefill 16 --runners ppf",
}
# With --search N: fewer.
QUICK_SEARCH = "--search 2"
# Has a test of its own, which takes minutes.
TESTED_ELSEWHERE = ("demo",)
# Other people's programs; the pages may name them, this test does not run them.
FOREIGN = (
    "git", "llama-cli", "llama-server", "lm_eval", "make", "pip", "pre-commit", "python", "torchrun", "vllm",
    "cd", "curl",
)  # fmt: skip
MARKS = {"gpu", "7b", "install"}


@dataclass(frozen=True)
class Block:
    language: str
    words: tuple[str, ...]
    text: str
    where: str

    @property
    def is_shell(self) -> bool:
        return self.language in ("sh", "bash", "shell") or (
            self.language == "" and self.text.startswith(("ppf ", "make "))
        )

    @property
    def runs(self) -> bool:
        """Not if it is marked, or names CUDA itself."""
        return not set(self.words) & MARKS and not re.search(r"[\"' =]cuda\b", self.text)

    def commands(self) -> list[list[str]]:
        """The words of every line, without comments; a backslash joins lines."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(page: Path) -> list[Block]:
    found = []
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```([^\n]*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        language, *words = match[1].split() or [""]
        line = text[: match.start()].count("\n") + 1
        found.append(Block(language, tuple(words), match[2], f"{page.name}:{line}"))
    return found


def run_block(block: Block) -> None:
    """Run, execute or write one block of a page in the current folder."""
    if block.is_shell:
        for words in block.commands():
            check_command(block, words)
    elif block.language == "python" and block.runs:
        exec(compile(block.text, block.where, "exec"), {"__name__": "page"})
    elif block.language == "python":
        ast.parse(block.text)
    elif block.language == "json" and block.words:
        json.loads(block.text)
        Path(block.words[0]).write_text(block.text, encoding="utf-8")


def check_command(block: Block, words: list[str]) -> None:
    program, *arguments = words
    if program != "ppf":
        assert program in FOREIGN, f"{block.where}: {program} is no command that the pages use"
        check_foreign(block, program, arguments)
        return
    understood(block, arguments)
    if block.runs and arguments[0] in COMMANDS and arguments[0] not in TESTED_ELSEWHERE:
        quick = shlex.split(QUICK.get(arguments[0], ""))
        if "--search" in arguments:
            quick += shlex.split(QUICK_SEARCH)
        result = ppf(*arguments, *quick)
        assert result.exit_code == 0, f"{block.where}: {' '.join(words)}\n{result.stderr}"


def understood(block: Block, arguments: list[str]) -> None:
    """The command exists, and takes these options."""
    name, *rest = arguments
    if name.startswith("--"):
        return
    assert name in COMMANDS, f"{block.where}: ppf has no command {name}"
    try:
        COMMANDS[name].make_context(name, rest)
    except typer.BadParameter.__base__ as error:  # click's UsageError, which typer carries along
        pytest.fail(f"{block.where}: ppf {' '.join(arguments)}: {error.format_message()}")


def check_foreign(block: Block, program: str, arguments: list[str]) -> None:
    """What of another program's command can be checked in this repository."""
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert all(word in targets for word in arguments if "=" not in word), f"{block.where}: {arguments}"
    if program == "pip":
        extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
        for wanted in re.findall(r"(?:ppf|\.)\[([\w,]+)\]", " ".join(arguments)):
            assert set(wanted.split(",")) <= set(extras), f"{block.where}: {wanted}"
    if program == "torchrun":
        assert arguments.count("-m") == 1 and arguments[arguments.index("-m") + 1] == "ppf", block.where
        understood(block, arguments[arguments.index("-m") + 2 :])
    if program == "python" and arguments[0].endswith(".py"):
        assert (ROOT / arguments[0]).exists(), f"{block.where}: {arguments[0]}"


@pytest.fixture(scope="module")
def quick():
    with pytest.MonkeyPatch.context() as patch:
        quick_learning(patch)
        patch.setattr(report_card, "RATIOS", (0.3,))
        yield patch


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, quick, one_thread) -> Path:
    """A folder after the quickstart: MODEL, texts, RUN, OUT and what else that page makes. Do not change it."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "ppf" / "data" / "tiny-2m", folder / "MODEL")
    text = (ROOT / "ppf" / "data" / "sample.txt").read_text(encoding="utf-8")
    (folder / "calibration.txt").write_text(text[:60_000], encoding="utf-8")
    (folder / "test.txt").write_text(text[-10_000:], encoding="utf-8")
    with quick.context() as patch:
        patch.chdir(folder)
        for block in blocks(DOCS / "quickstart.md"):
            run_block(block)
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "quickstart.md"], ids=lambda page: page.name)
def test_every_command_of_a_page_works(workspace, tmp_path, monkeypatch, page):
    """After the quickstart, which every page may take for granted."""
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))  # a page registers one
    found = blocks(page)
    if any((block.is_shell or block.language == "python") and block.runs for block in found):
        copy = Path(shutil.copytree(workspace, tmp_path / "docs"))
        monkeypatch.chdir(copy)
    for block in found:
        if block.language == "python" and "peft" in block.text and importlib.util.find_spec("peft") is None:
            continue
        if page.name == "tasks.md" and importlib.util.find_spec("lm_eval") is None:
            continue
        run_block(block)


def test_the_quickstart_leaves_what_it_says(workspace):
    report = json.loads((workspace / "OUT" / "ppf.json").read_text())
    assert report["requested_ratio"] == 0.37
    assert report["policy_from"] == Run(workspace / "RUN").policy(0.37).source
    assert json.loads((workspace / "OUT2" / "ppf.json").read_text())["policy_from"] == "search"
    assert json.loads((workspace / "OUT3" / "ppf.json").read_text())["policy_from"] == "given"
    assert json.loads((workspace / "OUT4" / "ppf.json").read_text())["recovery"]["tokens"] >= 1024


def test_the_readmes_commands_are_understood():
    """They stand for the quickstart's, which are run."""
    seen = 0
    for block in blocks(ROOT / "README.md"):
        if block.is_shell:
            for words in block.commands():
                seen += 1
                if words[0] == "ppf":
                    understood(block, words[1:])
                else:
                    check_foreign(block, words[0], words[1:])
        elif block.language == "python":
            ast.parse(block.text)
    assert seen >= 8


@pytest.mark.parametrize(
    "wrong", ["ppf prun RUN", "ppf prune RUN --ratoi 0.3 --output O", "ppf fit M --text T", "pruneit X"]
)
def test_a_wrong_command_is_noticed(wrong):
    block = Block("sh", ("gpu",), wrong, "page:1")
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        run_block(block)


def test_every_command_is_documented():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [name for name in COMMANDS if f"ppf {name}" not in text] == []


def test_marks_are_known():
    for page in PAGES:
        for block in blocks(page):
            if block.language in ("sh", "python"):
                assert set(block.words) <= MARKS, block.where


@pytest.mark.parametrize("page", sorted([*DOCS.glob("*.md"), *ROOT.glob("*.md")]), ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://", "#", "mailto:")):
            assert (page.parent / target.split("#")[0]).exists(), target


def test_every_page_stands_in_the_index():
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in DOCS.glob("*.md") if page.name != "README.md" and f"({page.name})" not in index] == []


def test_the_reference_is_up_to_date():
    made = runpy.run_path(str(DOCS / "api.py"))["page"]()
    assert made == (DOCS / "api.md").read_text(encoding="utf-8"), "run: python docs/api.py"
    assert made == runpy.run_path(str(DOCS / "api.py"))["page"]()
    assert not re.search(r"0x[0-9a-f]{6,}|/work/|/home/", made)  # nothing of this process or machine
