"""The teacher wherever its weights are, and a student whose batch does not fit: the same recovery."""

from pathlib import Path

import pytest
import torch
from cli_cases import answer, refusal
from factories import byte_tokenizer, llama, model_of, tokens, write_text
from safetensors.torch import load_file

from ppf import checkpoint
from ppf.deliver.recovery import RecoverySettings, recover, teaching
from ppf.deliver.recovery.objective import Objective
from ppf.deliver.recovery.teaching import DecoderTeacher, ModelTeacher, load_teacher
from ppf.errors import InputError
from ppf.model.build import pruned_config
from ppf.model.decoder import Decoder
from ppf.model.policy import Policy
from ppf.model.stream import Placement

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"tokens": 1024, "sequence_length": 32, "batch_tokens": 256, "micro_tokens": 128}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("taught")
    dense = model_of("llama")
    pruned = llama(pruned_config(dense.config, Policy([3, 2, 0, 1], [64, 0, 8, 32])))
    for name, model in (("dense", dense), ("pruned", pruned)):
        checkpoint.save(model, byte_tokenizer(), folder / name, {})
    write_text(folder / "text.txt")
    return folder


def recovered(folder: Path, name: str, method: str = "full", placement: Placement | None = None) -> dict:
    settings = RecoverySettings(method, **SMALL)
    places = {"teacher": folder / "dense", "placement": placement}
    return recover(folder / "pruned", folder / "text.txt", folder / name, settings=settings, device="cpu", **places)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3"])
def test_a_decoder_teaches_what_its_model_does(family):
    """Parts of two sizes; what is served by fused operations, and what takes transformers' own layers."""
    model = model_of(family)
    whole, layers = ModelTeacher(model), DecoderTeacher(Decoder.of_model(model))
    parts = [tokens(2, 24), tokens(2, 24, seed=2), tokens(1, 24, seed=3)]
    for ours, theirs in zip(layers.hidden(parts), whole.hidden(parts), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
        assert not ours.requires_grad and not theirs.requires_grad
    rows = tokens(3, 24)
    assert layers.log_perplexity(rows) == pytest.approx(whole.log_perplexity(rows), rel=1e-5)
    hidden = torch.randn(4, 48)
    torch.testing.assert_close(layers.head(hidden), whole.head(hidden))


def test_a_layer_that_streams_is_fetched_once_for_all_parts(folder, monkeypatch):
    teacher = load_teacher(folder / "dense", torch.device("cpu"), Placement("disk"))
    assert not teacher.decoder.resident
    read, source = [], teacher.decoder.layers._source
    monkeypatch.setattr(type(source), "__call__", _counted(type(source).__call__, read))
    list(teacher.hidden([tokens(1, 24, seed=seed) for seed in range(5)]))
    assert [read.count(index) for index in (1, 2, 3)] == [1, 1, 1]


def _counted(call, read):
    def counted(self, index):
        read.append(index)
        return call(self, index)

    return counted


def test_the_recovery_is_the_same_wherever_the_teacher_is(folder):
    whole = recovered(folder, "whole")
    for place in ("host", "disk"):
        report = recovered(folder, place, placement=Placement(place))
        for name in ("dense", "measured"):
            assert report[name]["log_perplexity"] == pytest.approx(whole[name]["log_perplexity"], rel=1e-4)
            assert report[name]["dtype"] == whole[name]["dtype"] and report[name]["device"] == whole[name]["device"]
        ours, theirs = (load_file(folder / name / "model.safetensors") for name in ("whole", place))
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-2, atol=2e-3)


def test_the_command_takes_the_place_of_the_teachers_weights(folder):
    arguments = ["recover", folder / "pruned", "--text", folder / "text.txt", "--teacher", folder / "dense"]
    arguments += ["--method", "norms", "--tokens", 256, "--batch-tokens", 256, "--sequence-length", 32]
    arguments += ["--device", "cpu", "--output", folder / "told"]
    refusal(*arguments, "--weights", "attic", field="weights", value="attic")
    refusal(*arguments, "--gpu-memory-gb", 0.5, field="gpu-memory-gb", value=0.5)
    assert not (folder / "told").exists()
    report = answer(*arguments, "--weights", "disk")
    assert report["recovery"]["processes"] == 1 and report["dense"]["perplexity"] > 1


def test_a_teacher_without_room_streams_which_is_said(folder, monkeypatch):
    monkeypatch.setattr(teaching, "chosen", lambda *_: "host")
    with pytest.warns(UserWarning, match="^ppf: the teacher's layers stream from host"):
        teacher = load_teacher(folder / "dense", torch.device("cpu"), Placement())
    assert isinstance(teacher, DecoderTeacher) and not teacher.decoder.resident


# A GPU that is too small


def _limit(patch: pytest.MonkeyPatch, sequences: int) -> list[int]:
    """Let memory end at so many sequences at once; what was tried, at each call."""
    tried, call = [], Objective.__call__

    def limited(self, student, rows, taught=None):
        tried.append(len(rows))
        loss = call(self, student, rows, taught)
        if len(rows) > sequences:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss

    patch.setattr(Objective, "__call__", limited)
    return tried


def test_a_batch_that_does_not_fit_is_halved_and_tried_again(folder, monkeypatch):
    settings = RecoverySettings("full", **(SMALL | {"micro_tokens": 64}))
    arguments = {"settings": settings, "teacher": folder / "dense", "device": "cpu"}
    recover(folder / "pruned", folder / "text.txt", folder / "fits", **arguments)
    tried = _limit(monkeypatch, 2)
    with pytest.warns(UserWarning, match="^ppf: memory is short: 64 tokens at once") as notes:
        recovered(folder, "halved")
    assert len([note for note in notes if "memory is short" in str(note.message)]) == 1
    assert tried == [4] + [2] * 4 * 4  # the first attempt, then four steps of four parts
    ours, theirs = (load_file(folder / name / "model.safetensors") for name in ("fits", "halved"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_attempt_that_fails_late_leaves_no_gradients(folder, monkeypatch):
    """The second part of the first step fails once: nothing of the first part is counted twice."""
    settings = RecoverySettings("norms", **(SMALL | {"micro_tokens": 64}))
    recover(
        folder / "pruned", folder / "text.txt", folder / "smooth", settings=settings, teacher=folder / "dense",
        device="cpu",
    )  # fmt: skip
    call, calls = Objective.__call__, []

    def failing(self, student, rows, taught=None):
        calls.append(len(rows))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(self, student, rows, taught)

    monkeypatch.setattr(Objective, "__call__", failing)
    with pytest.warns(UserWarning, match="memory is short: 64"):
        recovered(folder, "bumpy", "norms")
    assert calls[:3] == [4, 4, 2]
    ours, theirs = (load_file(folder / name / "model.safetensors") for name in ("smooth", "bumpy"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_one_sequence_that_does_not_fit_names_what_helps(folder, monkeypatch):
    _limit(monkeypatch, 0)
    with pytest.warns(UserWarning, match="32 tokens at once"), pytest.raises(InputError) as error:
        recovered(folder, "never")
    assert "sequence-length = 32" in str(error.value) and "--method" in str(error.value)
    assert not (folder / "never").exists()


def test_an_unfinished_recovery_goes_on_with_fewer_tokens_at_once(folder, monkeypatch):
    """As the refusal on many GPUs advises."""
    recovered(folder, "plain", "norms")
    with monkeypatch.context() as patch:
        call = Objective.__call__
        patch.setattr(Objective, "__call__", lambda self, *rest: _interrupt())
        with pytest.raises(KeyboardInterrupt):
            recovered(folder, "fewer", "norms")
        assert call is not Objective.__call__
    settings = RecoverySettings("norms", **(SMALL | {"micro_tokens": 32}))
    report = recover(
        folder / "pruned", folder / "text.txt", folder / "fewer", settings=settings, teacher=folder / "dense",
        device="cpu",
    )  # fmt: skip
    ours = load_file(folder / "plain" / "model.safetensors")
    theirs = load_file(folder / "fewer" / "model.safetensors")
    assert report["recovery"]["settings"]["micro_tokens"] == 32
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)


def _interrupt():
    raise KeyboardInterrupt
