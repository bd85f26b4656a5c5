"""Commands under torchrun: two processes give what one gives, and survive what happens to them."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from cli_cases import ppf, stored
from factories import quick_learning, write_checkpoint, write_text
from ranks_cases import files, quick_forked_together, quick_together, rows, running, together, wait_until, workers

from ppf import ranks
from ppf.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")
EVALUATIONS = 32
GONE = "Error: another process of this job has ended; start the same command again: it goes on where it stopped"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model and two texts."""
    made = tmp_path_factory.mktemp("ranks")
    write_checkpoint(made / "model")
    write_text(made / "text.txt")
    write_text(made / "other.txt", words=300, seed=5)
    return made


def fit_arguments(folder: Path, run: str) -> list[object]:
    sizes = {"evaluations": EVALUATIONS, "sequence-length": 32, "ffn-multiple": 16, "calibration-tokens": 512}
    options = [word for name, value in sizes.items() for word in (f"--{name}", value)]
    return [
        "fit",
        folder / "model",
        "--text",
        folder / "text.txt",
        "--device",
        "cpu",
        *options,
        "--output",
        folder / run,
    ]


@pytest.fixture(scope="module")
def one(folder, one_thread) -> Path:
    """A fit of one process."""
    with pytest.MonkeyPatch.context() as patch:
        quick_learning(patch)
        assert ppf(*fit_arguments(folder, "one")).exit_code == 0
    return folder / "one"


@pytest.fixture(scope="module")
def two(folder, one_thread) -> Path:
    """The same fit by two processes."""
    done = quick_together(2, *fit_arguments(folder, "two"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("evaluations") == 1  # one of them speaks
    return folder / "two"


def test_two_processes_give_the_run_of_one(one, two):
    """The same policies measured, in the same order, to the same bits; the same statistics, factors, predictor and
    agent."""
    assert rows(two) == rows(one) and len(rows(one)) == EVALUATIONS
    assert files(two) == files(one) and len(files(one)) == 4 + 4 + 4
    told = [json.loads((run / "run.json").read_text()) for run in (one, two)]
    assert told[0]["state"] == told[1]["state"] == "complete" and told[0]["settings"] == told[1]["settings"]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_ends_the_job_with_a_line_and_loses_no_row(folder, one, victim):
    """Then the same command, on another number of processes."""
    arguments = fit_arguments(folder, f"killed-{victim}")
    run = arguments[-1]
    with running(2, 0.1, *arguments) as job:
        wait_until(lambda: stored(run) >= 6 + 5 * victim or job.poll() is not None)
        os.kill(workers(job)[victim], signal.SIGKILL)
        _, errors = job.communicate(timeout=60)
    ours = [line for line in errors.splitlines() if line.startswith("Error: ")]
    assert job.returncode and ours == [GONE]
    kept = rows(run)
    assert 6 <= len(kept) < EVALUATIONS and kept == rows(one)[: len(kept)]
    with pytest.MonkeyPatch.context() as patch:
        quick_learning(patch)
        assert ppf(*arguments).exit_code == 0
    assert rows(run) == rows(one) and files(run) == files(one)


def test_a_mistake_is_one_line_and_one_exit_code(folder):
    done = together(2, *fit_arguments(folder, "none")[:-1], folder / "text.txt")
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert done.returncode and done.stdout == "" and len(lines) == 1 and lines[0].startswith("Error: output = ")
    assert set(re.findall(r"exitcode *: *(-?\d+)", done.stderr)) == {"2"}


def test_a_search_is_shared_and_the_rest_is_not(folder, one, tmp_path):
    policies = {}
    for processes in (1, 2):
        run = Path(shutil.copytree(one, tmp_path / f"run-{processes}"))
        arguments = "prune", run, "--ratio", 0.3, "--search", 8, "--output", tmp_path / f"out-{processes}", "--json"
        with pytest.MonkeyPatch.context() as patch:
            quick_learning(patch)
            done = ppf(*arguments) if processes == 1 else quick_forked_together(2, *arguments)
        policies[processes] = json.loads(done.stdout)["policy"], rows(run)
        assert len(rows(run)) == EVALUATIONS + 8
    assert policies[1] == policies[2]


def test_a_comparison_is_shared(folder, one):
    found = []
    for processes in (1, 2):
        output = folder / f"comparison-{processes}"
        methods = "--methods", "random:6,uniform-split", "--ratios", 0.3
        arguments = "compare", one, "--text", folder / "other.txt", "--device", "cpu", "--output", output, *methods
        done = ppf(*arguments) if processes == 1 else quick_forked_together(2, *arguments)
        assert (done.exit_code if processes == 1 else done.returncode) == 0, done.stderr
        cells = json.loads((output / "comparison.json").read_text())["cells"]
        found.append([(cell["label"], cell["evaluations"], cell["log_perplexity"], cell["policy"]) for cell in cells])
    assert found[0] == found[1] and len(found[0]) == 2


def test_shares_are_even_and_complete():
    costs = [7, 1, 6, 2, 5, 3, 4, 4]
    for processes in range(1, 5):
        shares = ranks.shares(costs, processes)
        assert sorted(item for share in shares for item in share) == list(range(len(costs)))
        loads = [sum(costs[item] for item in share) for share in shares]
        assert max(loads) <= 4 / 3 * max(max(costs), sum(costs) / processes)
    assert ranks.shares([1.0], 2) == [[0], []]


def test_alone_nothing_is_asked_of_anybody():
    ranks.start()
    assert (ranks.rank(), ranks.world(), ranks.first()) == (0, 1, True)
    assert ranks.broadcast("x") == "x" and ranks.gather("x") == ["x"] and ranks.from_first(lambda: "x") == "x"
    assert ranks.share([3.0, 1.0]) == [0, 1]


def test_half_an_environment_is_no_job(monkeypatch):
    """Clusters set WORLD_SIZE for whatever they start."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert ranks.launched() == (0, 1)


def test_errors_travel():
    import pickle

    error = pickle.loads(pickle.dumps(InputError("ratio", 1.5, "is too much", "Use less")))
    assert isinstance(error, InputError) and str(error) == "ratio = 1.5: is too much. Use less"
