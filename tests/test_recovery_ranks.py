"""Recovery by several processes: the losses and weights of one, whoever began and whoever ended it."""

import importlib.util
import json
import signal
import time
from pathlib import Path

import pytest
import torch
from factories import byte_tokenizer, llama, model_of, tokens, write_text
from ranks_cases import forks
from recovery_processes import CODE, recovered, recovered_together
from safetensors.torch import load_file

from ppf import checkpoint, ranks
from ppf.checkpoint.report import OWN
from ppf.deliver.recovery import RecoverySettings, training
from ppf.deliver.recovery.parts import Micro, fitting_sequences, parts_of
from ppf.errors import InputError
from ppf.model.build import pruned_config
from ppf.model.policy import Policy

pytestmark = pytest.mark.usefixtures("one_thread")
# Seven sequences a step, in parts of three: shares of four and three, and one process with a part to spare.
SMALL = {"tokens": 1792, "sequence_length": 32, "batch_tokens": 224, "micro_tokens": 96, "distillation": 0.5}
METHODS = ["full", "norms"] + ["lora"] * bool(importlib.util.find_spec("peft"))
STEPS = 8
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, two_gpus])]


@pytest.fixture(scope="module", params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory, device) -> Path:
    """A dense model with a tied head and biases, and a pruned one of it that lacks sub-layers, and a whole layer. For
    GPUs in bf16: what is trained then has another dtype than what is not."""
    folder = tmp_path_factory.mktemp("processes")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    dense = model_of("qwen2", dtype=dtype, tie_word_embeddings=True)
    pruned = llama(pruned_config(dense.config, Policy([3, 2, 0, 1], [64, 0, 0, 32])), dtype=dtype)
    for name, model in (("dense", dense), ("pruned", pruned)):
        checkpoint.save(model, byte_tokenizer(), folder / name, {})
    write_text(folder / "text.txt", 400)
    return folder


@pytest.fixture(scope="module")
def alone(folder, device, one_thread) -> dict[str, dict]:
    """Every method, by this process."""
    return {method: recovered(folder, f"{method}-{device}", device, method=method, **SMALL) for method in METHODS}


@pytest.fixture(scope="module")
def together(folder, device, alone) -> dict[str, list[dict]]:
    """In one go by two processes: every method, one that this process began, and one that is refused."""
    jobs = {method: {"name": f"{method}-{device}-2", "method": method} for method in METHODS}
    with pytest.MonkeyPatch.context() as patch:
        _begin(folder, f"begun-{device}", device, 3, patch)
    jobs["begun"] = {"name": f"begun-{device}", "method": "full"}
    jobs["refused"] = {"name": f"full-{device}", "method": "norms"}
    found = recovered_together(folder, 2, [job | SMALL | {"device": device} for job in jobs.values()])
    return {name: [answers[at] for answers in found] for at, name in enumerate(jobs)}


def _begin(folder: Path, name: str, device: str, steps: int, patch: pytest.MonkeyPatch) -> None:
    """Leave an unfinished recovery of so many steps behind."""
    save = training.Training._save

    def stop(self):
        save(self)
        if self.step == steps:
            raise KeyboardInterrupt

    patch.setattr(training.Training, "_save", stop)
    with pytest.raises(KeyboardInterrupt):
        recovered(folder, name, device, 0.0, method="full", **SMALL)


def _same(folder: Path, device: str, one: str, other: str) -> None:
    """Weights equal but for rounding. On a GPU that is bf16's, and AdamW makes whole steps of small gradients' signs:
    what the training changed must then agree on the whole."""
    before, ours, theirs = (load_file(folder / name / "model.safetensors") for name in ("pruned", one, other))
    assert set(ours) == set(theirs)
    if device == "cpu":
        for name in ours:
            torch.testing.assert_close(
                ours[name], theirs[name], rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )
    apart, moved = (
        sum(float((ours[name] - others[name]).float().square().sum()) for name in ours) ** 0.5
        for others in (theirs, before)
    )
    assert apart < moved * (1e-3 if device == "cpu" else 0.5) and moved > 0


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_give_the_run_of_one(folder, device, alone, together, method):
    one, two = alone[method], together[method]
    tolerance = 1e-5 if device == "cpu" else 5e-3
    assert two[0]["losses"] == two[1]["losses"] == pytest.approx(one["losses"], rel=tolerance)
    assert len(one["losses"]) == STEPS and one["losses"][-1] < one["losses"][0]
    _same(folder, device, f"{method}-{device}", f"{method}-{device}-2")
    ours, theirs = one["report"], two[0]["report"]
    assert two[0]["report"] == two[1]["report"] == _written(folder, f"{method}-{device}-2")
    assert theirs["recovery"]["processes"] == 2 and ours["recovery"]["processes"] == 1
    assert theirs["recovery"]["before"]["perplexity"] == pytest.approx(ours["recovery"]["before"]["perplexity"])
    for name in ("measured", "dense"):
        assert theirs[name]["log_perplexity"] == pytest.approx(ours[name]["log_perplexity"], rel=tolerance)
    assert not (folder / f"{method}-{device}-2.unfinished").exists()


def _written(folder: Path, name: str) -> dict:
    report = json.loads((folder / name / "ppf.json").read_text())
    return {field: value for field, value in report.items() if field not in OWN}


@pytest.mark.parametrize("method", METHODS)
def test_each_process_holds_its_share_of_what_is_trained(alone, together, method):
    one, two = alone[method], together[method]
    assert two[0]["all"] == two[1]["all"] == one["all"] == one["own"] == two[0]["own"] + two[1]["own"]
    assert max(answer["own"] for answer in two) < 0.55 * one["all"]


def test_two_processes_go_on_with_what_one_began(folder, device, alone, together):
    for answer in together["begun"]:
        assert answer["losses"] == pytest.approx(alone["full"]["losses"], rel=1e-5 if device == "cpu" else 5e-3)
        assert answer["losses"][:3] == alone["full"]["losses"][:3]  # the very ones that it wrote down
    _same(folder, device, f"full-{device}", f"begun-{device}")


def test_what_is_refused_is_refused_in_every_process(together):
    refused = {answer["refused"] for answer in together["refused"]}
    assert len(refused) == 1 and "output" in refused.pop()


def test_one_process_goes_on_with_what_two_began_and_one_of_them_was_killed(folder, device, alone):
    name = f"killed-{device}"
    job = {"name": name, "method": "full", "device": device, "pause": 0.2} | SMALL
    state = folder / f"{name}.unfinished" / "state.safetensors"
    with forks(2, CODE, folder, json.dumps([job])) as processes:
        deadline = time.monotonic() + 120
        while not state.exists() and time.monotonic() < deadline:
            assert all(process.poll() is None for process in processes), processes[0].ended().stderr
            time.sleep(0.02)
        processes[1].send_signal(signal.SIGKILL)
        done = processes[0].ended(within=60)
        assert done.returncode > 0 and "another process of this job has ended" in done.stderr
    step = int(load_file(state)["step"])
    assert 0 < step < STEPS and not (folder / name).exists()
    answer = recovered(folder, name, device, method="full", **SMALL)
    assert "losses" in answer, answer
    assert answer["losses"] == pytest.approx(alone["full"]["losses"], rel=1e-5 if device == "cpu" else 5e-3)
    _same(folder, device, f"full-{device}", name)


# How a batch is shared, and what is done when memory is short


@pytest.mark.parametrize(("world", "size", "batch"), [(1, 3, 7), (2, 3, 7), (3, 2, 7), (4, 8, 3), (2, 1, 2)])
def test_every_sequence_counts_in_one_process_and_all_have_as_many_parts(monkeypatch, world, size, batch):
    rows = tokens(batch, 5)
    monkeypatch.setattr(ranks, "world", lambda: world)
    shares = []
    for rank in range(world):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        shares.append(parts_of(rows, size))
    assert len({len(parts) for parts in shares}) == 1
    assert all(1 <= len(part) <= size for parts in shares for part, _ in parts)
    assert torch.equal(torch.cat([part for parts in shares for part, counts in parts if counts]), rows)


def test_a_part_that_does_not_fit_is_halved_until_one_sequence_does_not():
    config = model_of("llama").config
    micro = Micro(config, torch.device("cpu"), RecoverySettings("norms", sequence_length=32, micro_tokens=32 * 5))
    assert micro.sequences == 5
    for expected in (2, 1):
        with pytest.warns(UserWarning, match=rf"^ppf: memory is short: {32 * expected} tokens at once"):
            micro.halve()
        assert micro.sequences == expected
    with pytest.raises(InputError, match="sequence-length = 32: one sequence does not fit.*--weights host"):
        micro.halve()


def test_many_processes_are_told_how_to_go_on(monkeypatch):
    monkeypatch.setattr(ranks, "world", lambda: 2)
    settings = RecoverySettings("full", sequence_length=32, micro_tokens=128)
    with pytest.raises(InputError, match="micro-tokens = 128: .*--micro-tokens 64.*--method lora"):
        Micro(model_of("llama").config, torch.device("cpu"), settings).halve()


def test_sequences_fit_as_two_measurements_say():
    # 4 bytes for what any part needs, 6 a sequence: nine tenths of 100 bytes hold (90 - 4) // 6 of them.
    assert fitting_sequences(room=100, one=10, two=16) == 14
    assert fitting_sequences(room=5, one=10, two=16) == 1
