"""The whole fit: what it leaves, what it refuses, and that killing it changes nothing."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from factories import byte_tokenizer, config_of, llama, quick_learning, track_grams, write_checkpoint, write_text
from safetensors.torch import load_file, save_file

import ppf
from ppf.errors import InputError
from ppf.fitting import stages
from ppf.fitting.evaluation import Evaluator
from ppf.fitting.rounds import ROUNDS
from ppf.fitting.run import Run, Settings
from ppf.fitting.run.manifest import MANIFEST
from ppf.fitting.session import Session
from ppf.model.build import policy_of, pruned_config
from ppf.model.policy import Policy
from ppf.storage.sealed import Sealed

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = Settings(evaluations=40, ffn_multiple=8, sequence_length=32, calibration_tokens=2048)  # as tiny_run


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    quick_learning(monkeypatch)


def fit(folder: Path, output: Path, **changes) -> Run:
    arguments = {
        "model": folder / "model",
        "text": folder / "text.txt",
        "settings": SETTINGS,
        "device": "cpu",
    } | changes
    model, text = arguments.pop("model"), arguments.pop("text")
    return ppf.fit(model, text, output, **arguments)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the database, whose bytes depend on times."""
    files = (file for file in folder.rglob("*") if file.is_file() and "sqlite" not in file.name)
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(files)}


def rows(folder: Path) -> list:
    return [replace(row, seconds=0.0) for row in Run(folder).experience.rows()]


def test_what_a_fit_leaves(tiny_run):
    run = Run(tiny_run / "run")
    files = set(contents(run.path))
    layers = {f"{kind}/layer-00{index}.safetensors" for kind in ("statistics", "library") for index in range(4)}
    assert files == layers | {MANIFEST, ROUNDS, *(f"{n}.safetensors" for n in ("texts", "first", "predictor", "agent"))}
    assert run.is_complete and run.settings == SETTINGS and len(run.experience) == 40
    assert run.manifest["seconds"] > 0 and run.manifest["device"] == "cpu"
    assert run.manifest["versions"]["torch"].startswith(torch.__version__.split("+")[0])


def test_calibration_and_evaluation_share_no_text(tiny_run):
    run = Run(tiny_run / "run")
    text = (tiny_run / "text.txt").read_bytes()
    calibration, evaluation = run.sequences("calibration"), run.sequences("evaluation")
    assert calibration.shape[1] == evaluation.shape[1] == 32 and calibration.numel() == 2048
    tokenizer = ppf.checkpoint.load_tokenizer(tiny_run / "model")
    border = text.index(tokenizer.decode(evaluation[0]).encode())
    places = [text.index(tokenizer.decode(ids).encode()) for ids in calibration]
    assert max(places) + 32 <= border and border >= 0.7 * len(text)


def test_a_finished_run_is_returned_untouched(tiny_run, tmp_path, monkeypatch):
    run = Path(shutil.copytree(tiny_run / "run", tmp_path / "run"))
    before, times = contents(run), {file: file.stat().st_mtime_ns for file in run.rglob("*.*")}

    def never(*_):
        raise AssertionError("evaluated again")

    monkeypatch.setattr(Evaluator, "log_perplexities", never)
    again = fit(tiny_run, run)
    assert again.is_complete and contents(run) == before
    assert {file: file.stat().st_mtime_ns for file in times} == times


class Killed(BaseException):
    pass


def test_killed_at_any_moment_and_resumed_it_is_the_same_run(tiny_run, tmp_path, monkeypatch):
    """Dies in preparation, calibration, three evaluations, and before the last files are written."""
    output, draw = tmp_path / "run", random.Random(2)

    def dying(module, name: str, at: int) -> pytest.MonkeyPatch:
        """``module.name`` raises at its call number ``at``."""
        patch, original, calls = pytest.MonkeyPatch(), getattr(module, name), iter(range(10**6))

        def wrapped(*arguments, **keywords):
            if next(calls) == at:
                raise Killed
            return original(*arguments, **keywords)

        patch.setattr(module, name, wrapped)
        return patch

    deaths = [(stages, "write_manifest", 0), (Sealed, "write_safetensors", 2), (stages, "factorise_layer", 2)]
    deaths += [(Evaluator, "log_perplexities", draw.randrange(1, 4)) for _ in range(3)]
    deaths += [(Sealed, "write_safetensors", 0), (stages, "write_manifest", 0)]
    for index, (module, name, at) in enumerate(deaths):
        patch = dying(module, name, at)
        with pytest.raises(Killed):
            fit(tiny_run, output)
        patch.undo()
        assert index == 0 or not Run(output).is_complete
    assert fit(tiny_run, output).is_complete
    reference = tiny_run / "run"
    assert rows(output) == rows(reference)
    ours, theirs = contents(output), contents(reference)
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name] != theirs[name]} <= {MANIFEST}  # it holds the seconds
    assert not [file for file in output.rglob("*") if file.name.endswith(".tmp")]


def test_another_seed_is_another_run(tiny_run, tmp_path):
    output = tmp_path / "run"
    fit(tiny_run, output, settings=replace(SETTINGS, seed=1))
    assert rows(output) != rows(tiny_run / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"evaluations": 41}, "evaluations = 40, not 41"),
        ({"seed": 3}, "seed = 0, not 3"),
        ({"ranking": "maw"}, "ranking = flap-wifv, not maw"),
        ({"ffn_multiple": 16}, "ffn-multiple = 8, not 16"),
        ({"sequence_length": 64}, "sequence-length = 32, not 64"),
        ({"calibration_tokens": 99}, "calibration-tokens = 2048, not 99"),
        ({"evaluation_tokens": 99}, "evaluation-tokens = 16384, not 99"),
    ],
)
def test_a_run_with_other_settings_is_refused(tiny_run, change, message):
    before = contents(tiny_run / "run")
    with pytest.raises(InputError, match=message) as caught:
        fit(tiny_run, tiny_run / "run", settings=replace(SETTINGS, **change))
    assert caught.value.field == "output" and contents(tiny_run / "run") == before


def test_a_run_of_another_model_or_text_is_refused(tiny_run, tmp_path):
    other = write_checkpoint(tmp_path / "model", seed=9)
    text = write_text(tmp_path / "text.txt", seed=9)
    for change, message in (
        ({"model": other}, "another model"),
        ({"text": text}, "another text"),
        ({"eval_text": text}, "another text"),
    ):
        with pytest.raises(InputError, match=message):
            fit(tiny_run, tiny_run / "run", **change)


def test_folders_that_are_no_run_are_refused_and_left(tiny_run, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not a run"):
        fit(tiny_run, tmp_path)
    with pytest.raises(InputError, match="is not a folder"):
        fit(tiny_run, tmp_path / "notes.txt")
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"text": Path("/nowhere/text.txt")}, "text"),
        ({"eval_text": Path("/nowhere/text.txt")}, "eval-text"),
        ({"model": Path("/nowhere")}, "checkpoint"),
        ({"device": "cuda:77"}, "device"),
        ({"settings": replace(SETTINGS, ffn_multiple=48)}, "ffn-multiple"),
        ({"settings": replace(SETTINGS, sequence_length=10**6)}, "sequence-length"),
        ({"settings": replace(SETTINGS, evaluations=10**9)}, "evaluations"),
    ],
)
def test_mistakes_leave_nothing_behind(tiny_run, tmp_path, changes, field):
    with pytest.raises(InputError) as caught:
        fit(tiny_run, tmp_path / "run", **changes)
    assert caught.value.field == field and not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_damaged_weights_leave_nothing_behind(tiny_run, tmp_path, value):
    model = Path(shutil.copytree(tiny_run / "model", tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="NaN or Inf"):
        fit(tiny_run, tmp_path / "run", model=model)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("evaluations", 1), ("evaluations", 23), ("seed", -1), ("ffn_multiple", 0), ("sequence_length", 0),
     ("sequence_length", 1), ("calibration_tokens", 0), ("evaluation_tokens", 0), ("evaluations", 30.5), ("seed", True),
     ("ranking", "best")],
)  # fmt: skip
def test_settings_refuse(name, value):
    with pytest.raises(InputError) as caught:
        Settings(**{name: value})
    assert caught.value.field == name.replace("_", "-")


def test_an_evaluation_text_of_its_own(tiny_run, tmp_path):
    other = write_text(tmp_path / "other.txt", words=300, seed=5)
    settings = replace(SETTINGS, evaluations=24, calibration_tokens=10**6)
    run = fit(tiny_run, tmp_path / "run", eval_text=other, settings=settings)
    tokenizer = ppf.checkpoint.load_tokenizer(tiny_run / "model")
    whole, evaluated = (tiny_run / "text.txt").read_text(), other.read_text()
    assert whole.startswith(tokenizer.decode(run.sequences("calibration").flatten()))
    assert run.sequences("calibration").numel() > len(whole) - 32
    assert evaluated.startswith(tokenizer.decode(run.sequences("evaluation").flatten()))


def test_one_layers_grams_at_a_time(tiny_run, tmp_path, monkeypatch):
    living = track_grams(monkeypatch)
    monkeypatch.setattr(stages, "collect", lambda *_: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        fit(tiny_run, tmp_path / "run")
    assert living.peak == 6  # of its two sub-layers, while the shards of the text are added


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_multi_head_tied_models(tmp_path, dtype):
    write_checkpoint(tmp_path / "model", "mha", dtype=dtype, tie_word_embeddings=True)
    write_text(tmp_path / "text.txt")
    settings = replace(SETTINGS, evaluations=24, ranking="flap-wifv", ffn_multiple=16)
    run = fit(tmp_path, tmp_path / "run", settings=settings)
    policy, ids, session = run.policy(0.35).policy, run.sequences(), Session(run, "cpu")
    model = session.materialize(policy)
    assert model.dtype == dtype and model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        measured = float(model.float()(ids, labels=ids).loss)
    # 0.5 % in perplexity, computed in fp32 from the same weights.
    assert measured == pytest.approx(session.evaluator(dtype=torch.float32).log_perplexity(policy), abs=0.005)
    assert measured == pytest.approx(session.evaluator().log_perplexity(policy), abs=0.03)


IRREGULAR = Policy([3, 0, 2, 1], [64, 16, 0, 48])
SOURCES = {
    "gemma2": lambda: config_of("gemma2"),
    "phi3": lambda: config_of("phi3"),
    "olmo2": lambda: config_of("olmo2"),
    "half of a Qwen2": lambda: pruned_config(config_of("qwen2"), IRREGULAR),
}


@pytest.mark.filterwarnings("ignore:ppf. evaluation runs transformers' own layers")
@pytest.mark.parametrize("name", SOURCES)
def test_other_families_and_sources_whose_layers_differ(name, tmp_path):
    """From the checkpoint to a result: measured, materialised, and ratios that count from the source."""
    config = SOURCES[name]()
    llama(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    write_text(tmp_path / "text.txt")
    run = fit(tmp_path, tmp_path / "run", settings=replace(SETTINGS, evaluations=24))
    assert run.grid.dense() == policy_of(config) and run.grid.ratio(run.grid.dense()) == 0
    begins, sequences = name == "gemma2", run.sequences()
    assert bool((sequences[:, 0] == 256).all()) is begins and not (sequences[:, 1:] == 256).any()
    session, answer = Session(run, "cpu"), run.policy(0.3)
    assert answer.delivered_ratio == pytest.approx(0.3, abs=0.05)
    for kept, there in zip(answer.policy.attention + answer.policy.ffn, run.grid.maximum, strict=True):
        assert there or not kept
    model, evaluator = session.materialize(answer.policy), session.evaluator()
    with torch.no_grad():
        assert float(model(sequences, labels=sequences).loss) == pytest.approx(
            evaluator.log_perplexity(answer.policy), rel=1e-5
        )
    row = run.experience.rows()[7]
    assert evaluator.log_perplexity(row.policy) == pytest.approx(row.log_perplexity, rel=1e-6)


def test_the_manifest_says_what_was_fitted(tiny_run):
    manifest = json.loads((tiny_run / "run" / MANIFEST).read_text())
    assert manifest["fingerprint"] == ppf.checkpoint.fingerprint(tiny_run / "model")
    assert manifest["model"] == str(tiny_run / "model") and manifest["files"]["eval_text"] is None


@pytest.mark.gpu
def test_the_same_fit_on_cuda(tiny_run, tmp_path):
    run, reference = fit(tiny_run, tmp_path / "run", device="cuda"), Run(tiny_run / "run")
    assert run.manifest["device"] != "cpu"
    session = Session(run, "cuda")
    on_cpu, on_gpu = Session(reference, "cpu").evaluator(), session.evaluator()
    initial = [row for row in run.experience.rows() if row.round == 0]
    assert [row.policy for row in initial] == [row.policy for row in reference.experience.rows() if row.round == 0]
    for row in initial[::6]:
        assert on_gpu.log_perplexity(row.policy) == pytest.approx(on_cpu.log_perplexity(row.policy), rel=1e-3)
    policy = run.policy(0.4).policy
    model, ids = session.materialize(policy), run.sequences().cuda()
    assert model.device.type == "cuda"
    with torch.no_grad():
        assert float(model(ids, labels=ids).loss) == pytest.approx(on_gpu.log_perplexity(policy), rel=1e-4)
