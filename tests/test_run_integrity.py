"""Damage in a run: every file flipped, cut, emptied, zeroed, removed or of another run is named by whoever reads it."""

import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_cases import ppf as command
from factories import rewrite_manifest
from safetensors.torch import load_file

import ppf
from ppf.checkpoint.hashes import hash_folder
from ppf.choose.budget import Profile
from ppf.choose.budget.profile import PROFILE, load_profile, save_profile
from ppf.deliver.price import PRICES, portable_prices
from ppf.deliver.recovery.state import Unfinished
from ppf.errors import InputError
from ppf.fast.timing import Workload
from ppf.fitting.experience import Experience
from ppf.fitting.rounds import Journal
from ppf.fitting.run import Run
from ppf.fitting.session import Session
from ppf.storage.sealed import Sealed

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whole(tiny_run, tmp_path_factory) -> Path:
    """A run with all files that one can have."""
    folder = Path(shutil.copytree(tiny_run / "run", tmp_path_factory.mktemp("whole") / "run"))
    run = Run(folder)
    levels = [tuple(float(n) for n in range(run.grid.maximum[at] + 1)) for at in (0, -1)]
    save_profile(run.files, {}, [Profile(Workload(phase, 1, 8), 2.0, *levels) for phase in ("prefill", "decode")])
    price = {"ratio": 0.3, "perplexity": 9.0, "unrestricted": 8.0, "evaluations": 4, "cost": 0.125}
    run.files.write_json(PRICES, {"prices": [price]})
    return folder


@pytest.fixture
def copied(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def figures(folder: Path) -> list:
    """All that is computed from a run's files, and nothing that is measured anew."""
    run = Run(folder)
    session = Session(run, "cpu")
    library = [torch.cat([t.double().flatten() for t in session.factor_tensors(i).values()]).sum() for i in range(4)]
    return [
        run.policy(0.3).policy,
        run.predict(run.grid.dense()).mean,
        [row.log_perplexity for row in run.experience.rows()],
        [ranking.ffn for ranking in run.ranking],
        [run.moments(index).ffn.mean.sum() for index in range(4)],
        library,
        [run.sequences(part) for part in ("calibration", "evaluation")],
        Journal(run.files).rounds,
        load_profile(run, "decode", "profile"),
        portable_prices(session),
    ]


def files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def refused(folder: Path, name: str) -> InputError:
    with pytest.raises(InputError) as caught:
        figures(folder)
    assert caught.value.value == folder / name, caught.value
    assert len(str(caught.value).splitlines()) == 1
    return caught.value


def test_a_run_that_is_whole_is_read(whole, copied):
    assert str(figures(whole)) == str(figures(copied)) == str(figures(whole))


def test_flipped_bits_are_found_in_every_file(whole, copied):
    draw, reference = random.Random(17), str(figures(whole))
    for name in files(whole):
        file, content = copied / name, (whole / name).read_bytes()
        for at in [draw.randrange(8 * len(content)) for _ in range(4)]:
            damaged = bytearray(content)
            damaged[at // 8] ^= 1 << at % 8
            file.write_bytes(damaged)
            if name.endswith("sqlite"):
                _same_or_refused(copied, name, reference)
            else:
                refused(copied, name)
        file.write_bytes(content)
    assert str(figures(copied)) == reference


def _same_or_refused(folder: Path, name: str, reference: str) -> None:
    """A database has bytes that nobody reads."""
    try:
        assert str(figures(folder)) == reference
    except InputError as error:
        assert error.value == folder / name


DAMAGES: dict[str, Callable[[Path], object]] = {
    "removed": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "zeroed": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-50]),
    "garbage": lambda file: file.write_bytes(b"\xff" * 300),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damaged_file_is_named(whole, copied, damage):
    for name in files(whole):
        if damage == "removed" and name in (PROFILE, PRICES):
            continue  # those may be missing
        DAMAGES[damage](copied / name)
        error = refused(copied, "" if (damage, name) == ("removed", "run.json") else name)
        assert "missing" in error.problem or damage != "removed" or name == "run.json"
        shutil.copyfile(whole / name, copied / name)
    figures(copied)


def test_a_file_of_another_run_is_named(whole, copied, tmp_path):
    """Of another question, of the same one with other numbers in it, and one of this run under another name."""
    other = Sealed(tmp_path, "another run", "run", "")
    for name in (name for name in files(whole) if name.endswith(".safetensors")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        other.write_safetensors(name, load_file(whole / name))
        shutil.copyfile(tmp_path / name, copied / name)
        assert "belongs elsewhere" in refused(copied, name).problem
        Run(copied).files.write_safetensors(name, {**load_file(whole / name), "more": torch.zeros(1)})
        assert "belongs elsewhere" in refused(copied, name).problem
        shutil.copyfile(whole / name, copied / name)
    shutil.copyfile(whole / "library/layer-001.safetensors", copied / "library/layer-002.safetensors")
    refused(copied, "library/layer-002.safetensors")


def _experience(folder: Path, script: str) -> None:
    """Change rows, whatever the triggers say."""
    database = sqlite3.connect(folder / "experience.sqlite")
    for trigger in ("no_update", "no_delete", "no_replace"):
        database.execute(f"DROP TRIGGER {trigger}")
    database.executescript(script)
    database.close()


@pytest.mark.parametrize(
    "script",
    [
        "UPDATE evaluations SET log_perplexity = log_perplexity + 1e-9 WHERE id = 7",
        "UPDATE evaluations SET log_perplexity = 'x' WHERE id = 7",
        "UPDATE evaluations SET log_perplexity = 9e999 WHERE id = 7",
        "UPDATE evaluations SET round = 3 WHERE id = 7",
        "UPDATE evaluations SET source = 'agent', seconds = 0 WHERE id = 2",
        "UPDATE evaluations SET policy = '{}' WHERE id = 7",
        "UPDATE evaluations SET created = '2001-01-01 00:00:00' WHERE id = 1",
        "DELETE FROM evaluations WHERE id = 1",
        "DELETE FROM evaluations WHERE id = 7",
        "DELETE FROM evaluations WHERE id > 30",
        "DELETE FROM evaluations",
        "DROP TABLE evaluations",
    ],
)
def test_changed_rows_are_found(copied, script):
    _experience(copied, script)
    refused(copied, "experience.sqlite")
    result = command("info", copied)
    assert result.exit_code == 2 and "experience.sqlite" in result.stderr


def test_experience_of_another_run_is_named(copied):
    rows, path = Run(copied).experience.rows(), copied / "experience.sqlite"
    path.unlink()
    store = Experience(path, "another run")
    for row in rows:
        store.append(row)
    store.close()
    refused(copied, "experience.sqlite")


IMPOSSIBLE: dict[tuple[str, str], Callable[[torch.Tensor], torch.Tensor]] = {
    ("texts.safetensors", "evaluation"): lambda ids: ids.index_fill(1, torch.tensor([3]), 258),
    ("texts.safetensors", "calibration"): lambda ids: ids - 200,
    ("statistics/layer-002.safetensors", "ranking.ffn"): lambda order: order.clamp_max(60),
    ("statistics/layer-001.safetensors", "ffn.variance"): lambda x: -x,
    ("statistics/layer-003.safetensors", "attention.mean"): lambda x: x / 0,
    ("library/layer-000.safetensors", "ffn.regression"): lambda x: x.index_fill(0, torch.tensor([9]), torch.nan),
    ("library/layer-001.safetensors", "attention.regression"): lambda x: x[1:],
    ("library/layer-002.safetensors", "ffn.boundaries"): lambda x: x + 1,
    ("library/layer-003.safetensors", "attention.error"): lambda x: 2 * x,
    ("predictor.safetensors", "targets"): lambda x: x * torch.nan,
    ("predictor.safetensors", "levels"): lambda x: x[:0],
    ("predictor.safetensors", "offset"): lambda x: x.float(),
    ("agent.safetensors", "state"): lambda x: x[:-1],
}


@pytest.mark.parametrize("where", IMPOSSIBLE, ids=str)
def test_values_that_no_fit_writes_are_refused_with_the_right_checksum(copied, where):
    name, tensor = where
    rewrite_manifest(copied, seals={})  # else the checksum would not be the right one
    tensors = load_file(copied / name)
    Run(copied).files.write_safetensors(name, tensors | {tensor: IMPOSSIBLE[where](tensors[tensor])})
    refused(copied, name)


def test_a_file_is_read_whole_once_a_process(whole, copied, monkeypatch):
    for name in files(copied):
        os.utime(copied / name, (1e9, 1e9))
    read = []
    digest = Sealed._digest
    monkeypatch.setattr(Sealed, "_digest", lambda self, name, *rest: (read.append(name), digest(self, name, *rest))[1])
    monkeypatch.setattr("ppf.storage.sealed._SETTLED", 0)
    figures(copied)
    figures(copied)
    tensors = [name for name in read if name.endswith(".safetensors")]
    assert sorted(tensors) == [name for name in files(whole) if name.endswith(".safetensors")]


def test_a_file_that_may_not_be_read_is_not_called_damaged(copied, monkeypatch):
    def denied(self, *arguments, **named):
        raise PermissionError(13, "Permission denied", str(self))

    run = Run(copied)
    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(InputError, match="permission denied") as caught:
        run.files.require("agent.safetensors")
    assert "damaged" not in str(caught.value)


def test_a_model_from_memory_is_checked_file_by_file(tiny_run, tmp_path):
    """RUN/model, as a fit in memory leaves it."""
    folder = Path(shutil.copytree(tiny_run / "run", tmp_path / "run"))
    shutil.copytree(tiny_run / "model", folder / "model")
    rewrite_manifest(folder, source={"kind": "memory"}, model_files=hash_folder(folder / "model"))
    Run(folder).require_model()
    draw = random.Random(3)
    for name in files(folder / "model"):
        file = folder / "model" / name
        content = file.read_bytes()
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        for changed in (bytes(damaged), b""):
            file.write_bytes(changed)
            with pytest.raises(InputError, match="checksum") as caught:
                Run(folder).require_model()
            assert caught.value.value == file
        file.unlink()
        with pytest.raises(InputError, match="No such file") as caught:
            Run(folder).require_model()
        assert caught.value.value == file
        file.write_bytes(content)
    assert Session(Run(folder), "cpu").decoder.structure == Run(folder).structure


def test_a_finished_run_takes_down_where_its_model_has_moved_to(tiny_run, copied):
    rewrite_manifest(copied, model=str(copied / "gone"))
    with pytest.raises(InputError, match="gone"):
        Run(copied).require_model()
    before = {name: (copied / name).read_bytes() for name in files(copied)}
    ppf.fit(tiny_run / "model", tiny_run / "text.txt", copied, settings=Run(copied).settings, device="cpu")
    Run(copied).require_model()
    assert {name for name in before if (copied / name).read_bytes() != before[name]} == {"run.json"}


def test_commands_name_the_damaged_file(copied, tmp_path):
    """Each of those that compute with a run, where the file that it reads first is damaged."""
    out = tmp_path / "out"
    asked = {
        ("policy", copied, "--ratio", 0.3): "agent.safetensors",
        ("policy", copied, "--latency-ms", 3): PROFILE,
        ("prune", copied, "--ratio", 0.3, "--device", "cpu", "--output", out): "library/layer-002.safetensors",
        ("pareto", copied, "--output", out): "predictor.safetensors",
        ("report", copied, "--device", "cpu", "--output", out): "texts.safetensors",
        ("info", copied): "experience.sqlite",
        ("bench", copied, "--ratios", 0.3, "--device", "cpu"): "statistics/layer-001.safetensors",
    }
    for arguments, name in asked.items():
        content = (copied / name).read_bytes()
        (copied / name).write_bytes(bytes(len(content)))
        result = command(*arguments)
        assert result.exit_code == 2 and not out.exists(), (arguments, result.stderr)
        errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
        assert len(errors) == 1 and name in errors[0] and not result.stdout
        (copied / name).write_bytes(content)
    (copied / "run.json").unlink()
    assert "run.json" in command("info", copied).stderr


def test_an_unfinished_recovery_is_checked(tmp_path):
    """Its state flipped, emptied, of another question, or not of what is trained."""
    shapes = {"step": (), "weight.a": (3, 2)}
    state = {"step": torch.tensor(3), "weight.a": torch.ones(3, 2)}
    saved, other = (Unfinished(tmp_path / name, {"settings": {"seed": len(name)}}) for name in ("out", "other"))
    for unfinished in (saved, other):
        unfinished.begin()
        unfinished.save(state)
    assert torch.equal(saved.load(torch.device("cpu"), shapes)["weight.a"], state["weight.a"])
    file = saved.path / "state.safetensors"
    flipped = bytearray(file.read_bytes())
    flipped[-5] ^= 4
    for damaged in (bytes(flipped), b"", (other.path / file.name).read_bytes()):
        file.write_bytes(damaged)
        for read in (lambda: saved.load(torch.device("cpu"), shapes), saved.weights):
            with pytest.raises(InputError, match="start anew") as caught:
                read()
            assert caught.value.value == file
    for wrong in (
        {"weight.a": torch.ones(2, 3)},
        {"weight.b": torch.ones(1)},
        {"weight.a": torch.full((3, 2), torch.nan)},
    ):
        saved.save(state | wrong)
        with pytest.raises(InputError, match=r"weight\.") as caught:
            saved.load(torch.device("cpu"), shapes)
        assert caught.value.value == file
    question = saved.path / "question.json"
    question.write_text(question.read_text().replace('"seed": 3', '"seed": 4'))
    with pytest.raises(InputError, match="checksum") as caught:
        Unfinished(tmp_path / "out", {"settings": {"seed": 3}})
    assert caught.value.value == question
