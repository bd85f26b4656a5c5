"""Timings: every moment belongs to one stage, whatever nests, fails or runs beside it; and commands show them."""

import json
import subprocess
import sys
import threading
import time

import pytest
from cli_cases import answer, ppf
from factories import quick_learning

from ppf import timings
from ppf.fitting.run import Run
from ppf.timings import BETWEEN, STARTING, Timings

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def clock(monkeypatch):
    """``clock(n)`` lets n seconds pass for whoever asks ``time.perf_counter``."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_nested_stages_are_counted_once(clock):
    table = Timings(98.0)
    clock(1)
    with table.timed("outer"):
        clock(2)
        with table.timed("inner"):
            clock(4)
        clock(8)
        with table.timed("outer"):
            clock(16)
    clock(32)
    assert table.seconds() == {STARTING: 3, "outer": 26, "inner": 4, BETWEEN: 32}


def test_a_stage_that_fails_is_left(clock):
    table = Timings(100.0)
    with pytest.raises(ValueError), table.timed("work"):
        clock(1)
        raise ValueError
    clock(2)
    assert table.seconds() == {STARTING: 0, "work": 1, BETWEEN: 2}


def test_what_was_spent_since(clock):
    table = Timings(100.0)
    with table.timed("before"):
        clock(1)
    known = table.seconds()
    with table.timed("work"):
        clock(2)
    with table.timed("work"):
        clock(4)
    assert table.since(known) == {"work": 6}


def test_other_threads_count_nothing(clock):
    table, inside = Timings(100.0), []

    def work() -> None:
        with table.timed("elsewhere"):
            clock(1)
            inside.append(table.seconds())

    with table.timed("here"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len(inside) == 1
    assert table.seconds() == {STARTING: 0, "here": 1, BETWEEN: 0}


def test_stages_of_a_process_add_up_to_its_age():
    code = "import time; time.sleep(0.3); from ppf.timings import *; import json; a = time.perf_counter()\n"
    code += "with timed('work'): time.sleep(0.2)\nprint(json.dumps([seconds(), time.perf_counter() - a]))"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    outside = time.perf_counter() - start
    spent, measured = json.loads(done.stdout)
    assert spent["work"] == pytest.approx(0.2, abs=measured - 0.2 + 1e-3)
    # From its start, which is 0.3 s before it knew of us, and never longer than it was seen from outside. Linux counts
    # starts in hundredths.
    assert 0.3 - 0.02 <= spent[STARTING] <= outside
    assert sum(spent.values()) <= outside + 0.02


def test_a_fit_says_where_its_time_went(tiny_run):
    manifest = Run(tiny_run / "run").manifest
    spent = manifest["timings"]
    assert {"hashing", "calibrating", "evaluating", "learning predictor", "learning agent", "writing"} <= set(spent)
    assert STARTING not in spent and min(spent.values()) > 0
    # "seconds" begin after the texts and the weights are read.
    assert sum(spent.values()) >= manifest["seconds"] - 0.1


def test_commands_show_them_on_request(tiny_run, tmp_path, monkeypatch):
    quick_learning(monkeypatch)
    arguments = "prune", tiny_run / "run", "--ratio", 0.3, "--device", "cpu"
    assert "timings" not in answer(*arguments, "--output", tmp_path / "quiet")
    before, start = timings.seconds(), time.perf_counter()
    shown = ppf(*arguments, "--output", tmp_path / "told", "--timings", "--json")
    took = time.perf_counter() - start
    assert shown.exit_code == 0
    spent = json.loads(shown.stdout)["timings"]
    assert 0 < sum(spent.values()) - sum(before.values()) <= took
    lines = {line.split("  ")[0].strip(): line.split() for line in shown.stderr.splitlines()}
    for stage, seconds in spent.items():
        assert float(lines[stage][-2].replace(",", "")) == pytest.approx(seconds, abs=0.006)
    assert float(lines["together"][-2].replace(",", "")) == pytest.approx(sum(spent.values()), abs=0.006)


@pytest.mark.parametrize("command", ["fit", "prune", "compare", "recover", "report"])
def test_the_option_is_there(command):
    assert "--timings" in ppf(command, "--help").stdout
