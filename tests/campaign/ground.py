"""What is attacked: tiny models, a finished run, results and texts, made once and never changed; and copies of them."""

from __future__ import annotations

import atexit
import gc
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from . import children

FAMILIES = ("qwen2", "gemma3_text", "phi3")
FIT = (
    *("--evaluations", 24, "--ffn-multiple", 8, "--sequence-length", 32),
    *("--calibration-tokens", 2048, "--evaluation-tokens", 1024, "--device", "cpu"),
)
# Writes of a fit of this size until it has measured about half of its policies.
_HALFWAY = 120
PROFILE = "--prefill", 8, "--decode", 8, "--device", "cpu"


@dataclass(frozen=True)
class Ground:
    """The folder of all that is attacked; ``ground / "run"`` is a finished run of ``ground / "model"``."""

    folder: Path

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    @contextmanager
    def scratch(self, *names: str) -> Iterator[Path]:
        """A new folder with copies of ``names``, for one try; beside it lies the home folder of what runs there."""
        place = Path(tempfile.mkdtemp(prefix="try-", dir=self.folder.parent))
        try:
            (place / "home").mkdir()
            here = place / "here"
            here.mkdir()
            for name in names:
                copy = shutil.copytree if (self / name).is_dir() else shutil.copyfile
                copy(self / name, here / name)
            yield here
        finally:
            shutil.rmtree(place, ignore_errors=True)


@contextmanager
def made() -> Iterator[Ground]:
    """A ground, gone at the end."""
    place = Path(tempfile.mkdtemp(prefix="ppf-campaign-"))
    ground = Ground(place / "ground")
    ground.folder.mkdir()
    (place / "home").mkdir()
    try:
        for work in (lambda: _write_models(ground), *map(_command, _commands()), lambda: _begin_a_fit(ground)):
            _require(children.run(lambda work=work: _noting(work, place / "modules"), ground.folder))
            _import_all(place / "modules")
        gc.collect()
        gc.freeze()
        yield ground
    finally:
        shutil.rmtree(place, ignore_errors=True)


def prepare() -> None:
    """Import what children need, and let what they learn be quick. Call it once, before the first child."""
    import pytest
    import torch
    from factories import quick_learning

    import ppf.cli
    import ppf.deliver.api
    import ppf.deliver.elastic.loading
    import ppf.deliver.export
    import ppf.deliver.recovery
    import ppf.lab.comparison
    import ppf.lab.pareto
    import ppf.lab.report.page

    torch.set_num_threads(1)
    quick_learning(pytest.MonkeyPatch())
    ppf.lab.report.RATIOS = (0.3,)
    atexit._clear()  # others' farewells take longer than a try


def _write_models(ground: Ground) -> None:
    import json

    from export_cases import bpe_tokenizer, write_random
    from factories import model_of, write_checkpoint, write_text

    from ppf.model.policy import Policy

    for seed, name in enumerate(("model", "stranger")):
        write_checkpoint(ground / name, seed=seed, vocab_size=300, bos_token_id=0, eos_token_id=1)
        bpe_tokenizer().save_pretrained(ground / name)  # llama.cpp wants one with merges
    for family in FAMILIES:
        write_checkpoint(ground / family, family=family)
    shutil.copytree(ground / "model", ground / "sharded")
    (ground / "sharded" / "model.safetensors").unlink()
    model_of("llama", vocab_size=300).save_pretrained(ground / "sharded", max_shard_size="60KB")
    write_random(ground / "wide", Policy([3, 3, 3, 0], [512, 256, 256, 0]), intermediate_size=512)
    write_text(ground / "text.txt", words=3000)
    write_text(ground / "test.txt", words=3000, seed=1)
    for name, attention, ffn in (("policy", [3, 2, 1, 2], [64, 48, 32, 24]), ("even", [2] * 4, [32] * 4)):
        policy = {"format": 2, "widths": {"attention": attention, "ffn": ffn}}
        (ground / f"{name}.json").write_text(json.dumps(policy))


def _commands() -> Iterator[tuple[object, ...]]:
    """What makes the rest of the ground, in this order."""
    yield "fit", "model", "--text", "text.txt", "--output", "run", *FIT
    yield "fit", "stranger", "--text", "test.txt", "--output", "other", *FIT
    yield "profile", "run", *PROFILE
    yield "prune", "run", "--policy", "policy.json", "--output", "pruned", "--device", "cpu"
    yield "prune", "run", "--policy", "even.json", "--output", "even", "--device", "cpu"
    yield "prune", "other", "--policy", "policy.json", "--output", "changeling", "--device", "cpu"
    # What follows leaves nothing: it is done for what it imports.
    yield "info", "pruned", "--json"
    yield "policy", "run", "--ratio", 0.3
    yield "eval", "pruned", "--text", "test.txt", "--sequence-length", 32, "--tokens", 64, "--device", "cpu"
    yield "generate", "gemma3_text", "--prompt", "the", "--max-new-tokens", 1, "--device", "cpu"
    yield "generate", "phi3", "--prompt", "the", "--max-new-tokens", 1, "--device", "cpu"
    yield "generate", "qwen2", "--prompt", "the", "--max-new-tokens", 1, "--device", "cpu"


def _command(words: tuple[object, ...]) -> Callable[[], None]:
    return children.command(*words)


def _noting(work: Callable[[], None], file: Path) -> None:
    """Do ``work`` and note which modules that has loaded."""
    try:
        work()
    finally:
        with file.open("a") as notes:
            print(*sys.modules, sep="\n", file=notes)


def _import_all(file: Path) -> None:
    """Import what every child from now on would have to: most of a try would be that."""
    for name in dict.fromkeys(file.read_text().splitlines()):
        if name not in sys.modules:
            with suppress(Exception):  # of the kind that only its owner can import
                import_module(name)


def _begin_a_fit(ground: Ground) -> None:
    """``ground / "begun"``: a fit that was killed in the middle of its measurements; and a latency to ask for."""
    from ppf.choose.budget.profile import load_profile
    from ppf.fitting.run import Run

    run = Run(ground / "run")
    least, most = load_profile(run, "prefill", "latency-ms").costs(run.grid).range(run.grid)
    (ground / "latency.txt").write_text(str((least + most) / 2))
    fit = children.command("fit", "model", "--text", "text.txt", "--output", "begun", *FIT)
    ended = children.run(fit, ground.folder, lambda: children.arm("write", _HALFWAY, sends=signal.SIGKILL))
    assert ended.signal == signal.SIGKILL, ended.err


def _require(ended: children.Ended) -> None:
    if ended.code != 0:
        raise RuntimeError(f"the ground could not be made: exit code {ended.code}\n{ended.err}")
