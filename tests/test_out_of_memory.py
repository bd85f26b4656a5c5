"""A GPU with too little memory: every command gets through with less, or says in one line what helps."""

import json
from contextlib import contextmanager

import pytest
import torch
from cli_cases import QUICK, ppf
from factories import one_thread, quick_learning

pytestmark = pytest.mark.gpu
MEGABYTES = 1, 2, 4, 8, 16, 32, 64, 128, 512
"""From less than the tiny model's activations to more than any command wants."""


@contextmanager
def held_to(megabytes: int):
    """torch's allocator gives no more than this, beside what is held already."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(((megabytes << 20) + torch.cuda.memory_reserved()) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def pruned(tiny_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("memory") / "pruned"
    with one_thread():
        assert ppf("prune", tiny_run / "run", "--ratio", 0.4, "--output", out, "--device", "cuda").exit_code == 0
    return out


NAMES = "fit", "search", "prune", "thorough", "eval", "recover", "generate", "bench"


def command(name, folder, tiny_run, pruned):
    run, text, out = tiny_run / "run", tiny_run / "text.txt", folder / "out"
    found = {
        "fit": ("fit", tiny_run / "model", "--text", text, "--output", out, *QUICK),
        "search": ("prune", run, "--ratio", 0.3, "--search", 8, "--output", out),
        "prune": ("prune", run, "--ratio", 0.4, "--output", out),
        "thorough": ("prune", run, "--ratio", 0.4, "--refit", "thorough", "--output", out),
        "eval": ("eval", pruned, "--text", text),
        "recover": ("recover", pruned, "--text", text, "--tokens", 4096, "--output", out),
        "generate": ("generate", pruned, "--prompt", "Once", "--max-new-tokens", 8),
        "bench": ("bench", pruned, "--new-tokens", 16, "--prompt", 16, "--prefill", 16, "--runners", "ppf"),
    }
    return found[name]


@pytest.mark.parametrize("name", NAMES)
def test_less_and_less_memory(name, tiny_run, pruned, tmp_path, monkeypatch):
    quick_learning(monkeypatch)
    got = {}
    for megabytes in MEGABYTES:
        folder = tmp_path / str(megabytes)
        folder.mkdir()
        with held_to(megabytes):
            result = ppf(*command(name, folder, tiny_run, pruned), "--device", "cuda", "--json")
        said = json.loads(result.stdout)
        got[megabytes] = result.exit_code
        if result.exit_code:
            assert "memory" in said["error"]["problem"] and said["error"]["remedy"], said
    assert got[MEGABYTES[-1]] == 0, got
    # Whatever gets through with little gets through with more.
    codes = [got[megabytes] for megabytes in MEGABYTES]
    assert codes == sorted(codes, reverse=True), got
