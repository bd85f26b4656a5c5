"""`lm_eval --model hf --model_args pretrained=OUT` on a pruned checkpoint, with a local task and no network.

Needs lm_eval, and ppf installed in the same environment: `make test-export`. Skipped where lm_eval is not installed.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from export_cases import POLICIES, SAMPLE, UNIFORM, prune_to
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppf.deliver.export import open_source, to_hf

pytest.importorskip("lm_eval", reason="lm_eval is not installed: make test-export")
pytestmark = pytest.mark.usefixtures("one_thread")

# As in docs/formats.md.
TASK = """
task: local_text
dataset_path: text
dataset_kwargs:
  data_files:
    test: {text}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
metadata:
  version: 1
"""


def bits_per_byte(checkpoint: Path, text: Path, folder: Path, options: str = "") -> float:
    """What the stock command says about ``text``, one document a line."""
    folder.mkdir()
    (folder / "local_text.yaml").write_text(TASK.format(text=text))
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", "1"]
    command += ["--model_args", f"pretrained={checkpoint},dtype=float32{options}", "--tasks", "local_text"]
    command += ["--include_path", str(folder), "--output_path", str(folder / "results")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=os.environ | offline, timeout=400)
    assert done.returncode == 0, done.stderr
    (results,) = (folder / "results").rglob("results_*.json")
    return json.loads(results.read_text())["results"]["local_text"]["bits_per_byte,none"]


@torch.no_grad()
def expected(checkpoint: Path, text: Path) -> float:
    """The same figure by hand, in transformers: lm_eval scores the tokenizer's own begin token too, after another."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), AutoTokenizer
    tokenizer, nats, size = tokenizer.from_pretrained(checkpoint), 0.0, 0
    for line in text.read_text(encoding="utf-8").splitlines():
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(line)["input_ids"]]])
        nats += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        size += len(line.encode())
    return nats / size / math.log(2)


def lines_of(path: Path, output: Path, count: int, longest: int = 1500) -> Path:
    """The first lines of ``path`` that have any text and fit the model's context."""
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if 20 < len(line.strip()) < longest][:count]
    output.write_text("\n".join(kept) + "\n", encoding="utf-8")
    return output


@pytest.mark.parametrize("kind", ["non-uniform", "uniform", "self-contained"])
def test_stock_command(kind, tmp_path):
    checkpoint = prune_to(tmp_path / "in", UNIFORM if kind == "uniform" else POLICIES[0.3])
    text, options = lines_of(SAMPLE, tmp_path / "text.txt", 12), ""
    if kind == "self-contained":
        to_hf(open_source(checkpoint), tmp_path / "out", self_contained=True)
        checkpoint, options = tmp_path / "out", ",trust_remote_code=True"
    measured = bits_per_byte(checkpoint, text, tmp_path / "eval", options)
    assert measured == pytest.approx(expected(checkpoint, text), rel=1e-4)


@pytest.mark.reference
def test_on_the_wikitext_test_set(reference, tmp_path):
    checkpoint = prune_to(tmp_path / "in", POLICIES[0.3])
    text = lines_of(reference / "text" / "wiki.test.raw", tmp_path / "text.txt", 60)
    measured = bits_per_byte(checkpoint, text, tmp_path / "eval")
    assert measured == pytest.approx(expected(checkpoint, text), rel=1e-4)
