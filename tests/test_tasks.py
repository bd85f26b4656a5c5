"""``--tasks``: the figures are those of a computation by hand in transformers, on items of every form; what is refused.

Needs lm_eval (``pip install 'ppf[eval]'``), which the extra ``dev`` brings.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_cases import answer, ppf, refusal
from factories import TINY, write_text
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import ppf as package
from ppf.checkpoint import load, load_tokenizer
from ppf.cli.tasks import tasks_table
from ppf.errors import PPFError
from ppf.fitting.tasks import Tasks, harness

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'ppf[eval]'")
pytestmark = pytest.mark.usefixtures("one_thread")

ALONE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
QUERIES = ("The city of", "In the year 1900 there", "He was born in", "Question: How many is 3 and 4?\nAnswer:")
CHOICES = ([" the", " London", " a river, and"], [" was", " were many of them", " q"], [" 1890", " the"], [" 7", " 12"])


@pytest.fixture(scope="module")
def by_hand():
    """transformers' own model and tokenizer of the bundled checkpoint, in float32."""
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32), AutoTokenizer.from_pretrained(TINY)


@torch.no_grad()
def log_probability(by_hand, context: str, continuation: str) -> tuple[float, bool]:
    """Of ``continuation`` after ``context``, and whether greedy decoding gives it."""
    model, tokenizer = by_hand
    tokens, start = tokenizer(context + continuation)["input_ids"], len(tokenizer(context)["input_ids"])
    scores = model(torch.tensor([tokens])).logits[0].log_softmax(-1)[start - 1 : -1]
    wanted = torch.tensor(tokens[start:])
    return float(scores.gather(1, wanted[:, None]).sum()), bool((scores.argmax(-1) == wanted).all())


def best(by_hand, pairs: list[tuple[str, str]], lengths: list[int] | None = None) -> int:
    scores = [log_probability(by_hand, *pair)[0] for pair in pairs]
    return max(range(len(pairs)), key=lambda i: scores[i] / (lengths[i] if lengths else 1))


def write_items(folder: Path, name: str, rows: list[dict]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def figures(folder: Path, name: str, **options) -> dict[str, float]:
    found = package.evaluate(TINY, tasks=Tasks.open(name, folder, **options), device="cpu", dtype="float32")["tasks"]
    assert list(found) == [name]
    return {figure: of["value"] for figure, of in found[name]["figures"].items()}


def test_multiple_choice(by_hand, tmp_path):
    """Half of the items have the choice that wins by hand as gold, for acc or for acc_norm: no other half will do."""
    likeliest, rows, norm = [], [], 0
    for number, (query, choices) in enumerate(zip(QUERIES, CHOICES, strict=True)):
        pairs = [(query, choice) for choice in choices]
        likeliest.append(best(by_hand, pairs))
        gold = (likeliest[-1] + number % 2) % len(choices)
        norm += best(by_hand, pairs, [len(choice) - 1 for choice in choices]) == gold
        rows.append({"query": query, "choices": choices, "gold": gold, "from": "here"})
    write_items(tmp_path / "own", "quiz", rows)
    assert figures(tmp_path / "own", "quiz") == {"acc": 0.5, "acc_norm": norm / 4}
    assert figures(tmp_path / "own", "quiz", limit=1, batch_size=2)["acc"] == 1.0


def test_every_prediction_is_the_one_by_hand(by_hand, tmp_path):
    from lm_eval.models.huggingface import HFLM

    rows = [{"query": q, "choices": c, "gold": 0} for q, c in zip(QUERIES, CHOICES, strict=True)]
    write_items(tmp_path / "own", "quiz", rows)
    tasks = Tasks.open("quiz", tmp_path / "own")
    judged = HFLM(pretrained=load(TINY, "cpu", "float32"), tokenizer=load_tokenizer(TINY), batch_size=8)
    samples = tasks.results(tasks.found["quiz"], judged)["samples"]["quiz"]
    for row, sample in zip(rows, samples, strict=True):
        measured = [resps[0] for resps in sample["resps"]]
        wanted = [log_probability(by_hand, row["query"], choice) for choice in row["choices"]]
        assert [score for score, _ in measured] == pytest.approx([score for score, _ in wanted], abs=1e-4)
        assert [greedy for _, greedy in measured] == [greedy for _, greedy in wanted]


def test_contexts_with_one_continuation(by_hand, tmp_path):
    contexts, continuation = ["The king of France", "A small red dog", "Seven of the"], " was born in"
    winner = best(by_hand, [(context, continuation) for context in contexts])
    rows = [{"contexts": contexts, "continuation": continuation, "gold": gold} for gold in range(3)]
    write_items(tmp_path / "own", "schema", rows)
    assert figures(tmp_path / "own", "schema") == {"acc": pytest.approx(1 / 3)}
    write_items(tmp_path / "own", "schema", [rows[winner]])
    assert figures(tmp_path / "own", "schema") == {"acc": 1.0}


def test_last_words_greedy(by_hand, tmp_path):
    model, tokenizer = by_hand
    ids = tokenizer(QUERIES[1], return_tensors="pt")["input_ids"]
    greedy = tokenizer.decode(model(ids).logits[0, -1].argmax())
    rows = [{"context": QUERIES[1], "continuation": greedy}, {"context": QUERIES[0], "continuation": " zebra"}]
    write_items(tmp_path / "own", "words", rows)
    scores = [log_probability(by_hand, row["context"], row["continuation"]) for row in rows]
    assert [greedy for _, greedy in scores] == [True, False]
    perplexity = float(torch.tensor([score for score, _ in scores]).mean().neg().exp())
    assert figures(tmp_path / "own", "words") == {"acc": 0.5, "perplexity": pytest.approx(perplexity, rel=1e-4)}


def test_generated_answers(by_hand, tmp_path):
    """Numbers and first lines, as greedy generation in transformers gives them."""
    model, tokenizer = by_hand
    numbers, lines = [], []
    for query in ("In the year 1900 there were 1,", "Between 1990 and 19"):
        prompt = tokenizer(query, return_tensors="pt")
        out = model.generate(**prompt, do_sample=False, max_new_tokens=256, pad_token_id=0)[0]
        text = tokenizer.decode(out[prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        found = [first or second for first, second in re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)]
        numbers.append({"query": query, "answer": re.sub(r"[,$]", "", found[-1]).rstrip(".")})
        lines.append({"query": query, "answer": re.findall(r"[^\n]+", text.split("\n\n")[0])[0].strip()})
    write_items(tmp_path / "own", "sums", [*numbers, {"query": QUERIES[3], "answer": "-99999"}])
    assert figures(tmp_path / "own", "sums") == {"exact_match": pytest.approx(2 / 3)}
    write_items(tmp_path / "own", "lines", [*lines, {"query": QUERIES[0], "answer": "no such line"}])
    assert figures(tmp_path / "own", "lines") == {"exact_match": pytest.approx(2 / 3)}


YAML = """
task: from_yaml
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: query
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metadata:
  version: 2.5
"""


@pytest.fixture(scope="module")
def quiz(tmp_path_factory) -> Path:
    """A folder with items, and with a configuration of lm_eval's for the same ones."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"query": q, "choices": c, "gold": 0} for q, c in zip(QUERIES, CHOICES, strict=True)]
    write_items(folder, "quiz", rows)
    (folder / "from_yaml.yaml").write_text(YAML.format(file=folder / "quiz.jsonl"))
    return folder


def test_the_command_says_what_was_judged(quiz, tiny_run):
    arguments = ("eval", tiny_run / "model", "--tasks", "quiz, from_yaml", "--task-folder", quiz, "--limit", 3)
    data = answer(*arguments)
    assert data["perplexity"] is None and data["protocol"] is None
    ours, theirs = data["tasks"]["quiz"], data["tasks"]["from_yaml"]
    assert ours["items"] == 3 and ours["items_there_are"] == 4 and ours["few_shot"] == 0 and ours["version"] == 1
    assert ours["data"]["file"] == str(quiz / "quiz.jsonl") and len(ours["data"]["sha256"]) == 64
    assert theirs["version"] == 2.5 and theirs["data"]["dataset"] == "json"
    assert theirs["figures"]["acc"] == ours["figures"]["acc"] and ours["figures"]["acc"]["stderr"] >= 0
    text = ("--text", tiny_run / "text.txt", "--sequence-length", 64, "--tokens", 640)
    both = answer(*arguments, *text)
    assert both["tasks"] == data["tasks"]
    assert both["perplexity"] == answer("eval", tiny_run / "model", *text)["perplexity"]
    shown = ppf(*arguments)
    assert re.search(r"quiz +acc_norm +[01]\.\d{4}", shown.stdout) and "perplexity" not in shown.stdout
    assert "loglikelihood" not in shown.stderr + shown.stdout and "it/s" not in shown.stderr


def test_prune_writes_what_eval_measures(quiz, tiny_run, tmp_path):
    judged = ("--tasks", "quiz", "--task-folder", quiz)
    out = tmp_path / "out"
    data = answer("prune", tiny_run / "run", "--ratio", 0.4, "--output", out, *judged, "--device", "cpu")
    assert data["tasks"] == json.loads((out / "ppf.json").read_text())["tasks"]
    assert data["tasks"] == answer("eval", out, *judged, "--device", "cpu")["tasks"]
    shown = ppf("prune", tiny_run / "run", "--ratio", 0.4, "--output", tmp_path / "other", *judged).stdout
    assert re.search(r"quiz +acc +[01]\.", shown)


def test_compare_judges_what_prune_writes(quiz, tiny_run, tmp_path):
    """The same policy gives the same figures, whether its model is written or made in memory; limits are refused."""
    judged = ("--tasks", "quiz", "--task-folder", quiz, "--device", "cpu")
    report = write_text(tmp_path / "report.txt", words=300, seed=5)
    compared = ("compare", tiny_run / "run", "--text", report, "--output", tmp_path / "out", "--ratios", 0.4)
    data = answer(*compared, "--methods", "dynamic", *judged)
    (cell,) = data["cells"]
    pruned = answer("prune", tiny_run / "run", "--ratio", 0.4, "--output", tmp_path / "pruned", *judged)
    assert cell["policy"] == pruned["policy"] and cell["tasks"] == pruned["tasks"]
    assert data["dense_tasks"] == answer("eval", tiny_run / "model", *judged)["tasks"]
    shown = ppf(*compared, "--methods", "dynamic", *judged).stdout
    assert re.search(r"PPF dynamic +40% +[01]\.\d{3}", shown) and "quiz acc_norm" in shown
    refusal(*compared, "--limit", 3, field="limit", value=3)
    refusal(*compared, *judged, "--weights", "disk", field="tasks", value="quiz")


def test_what_is_refused(quiz, tiny_run, tmp_path):
    model, text = tiny_run / "model", tiny_run / "text.txt"
    refusal("eval", model, field="text")
    assert "quiz" in refusal("eval", model, "--tasks", "quizz", "--task-folder", quiz, field="tasks", value="quizz")
    refusal("eval", model, "--tasks", "quiz", "--task-folder", quiz, "--limit", 0, field="limit", value=0)
    refusal("eval", model, "--tasks", "quiz", "--task-folder", quiz, "--batch-size", -1, field="batch-size", value=-1)
    refusal("eval", model, "--tasks", " ,", field="tasks")
    refusal("eval", model, "--tasks", "quiz", "--task-folder", tmp_path / "none", field="task-folder")
    refusal("eval", model, "--text", text, "--limit", 3, field="limit", value=3)
    refusal("eval", model, "--text", text, "--task-folder", quiz, field="task-folder", value=quiz)
    streamed = ("--tasks", "quiz", "--task-folder", quiz, "--weights", "disk")
    assert "stream" in refusal("eval", model, *streamed, field="tasks", value="quiz")
    out = tmp_path / "out"
    refusal("prune", tiny_run / "run", "--ratio", 0.3, "--output", out, *streamed, field="tasks", value="quiz")
    write_items(tmp_path / "long", "sums", [{"query": "1 and 1 is", "answer": "2"}])
    message = refusal("eval", model, "--tasks", "sums", "--task-folder", tmp_path / "long", field="tasks", value="sums")
    assert "256 tokens" in message and not out.exists()


@pytest.mark.parametrize(
    ("line", "at", "problem"),
    [
        ('{"query": "a", "choices": [" b", " c"], "gold": 2}', 2, "'gold'"),
        ('{"query": "a", "choices": [" b", " c"], "gold": true}', 2, "'gold'"),
        ('{"query": "a", "choices": [" b"], "gold": 0}', 2, "'choices'"),
        ('{"query": "a", "choices": [" b", ""], "gold": 0}', 2, "'choices'"),
        ('{"query": "", "choices": [" b", " c"], "gold": 0}', 2, "'query'"),
        ('{"choices": [" b", " c"], "gold": 0}', 2, "'query'"),
        ("[1, 2]", 2, "not a JSON object"),
        ("{", 2, "not JSON"),
        ("", 2, "not JSON"),
    ],
)
def test_a_bad_item_is_named(tmp_path, line, at, problem):
    good = '{"query": "a", "choices": [" b", " c"], "gold": 1}'
    file = tmp_path / "quiz.jsonl"
    file.write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(package.InputError, match=re.escape(f"{file}:{at}")) as raised:
        Tasks.open("quiz", tmp_path)
    assert problem in raised.value.problem


def test_files_without_items_of_a_known_form(tmp_path):
    (tmp_path / "other.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(package.InputError, match="query, choices, gold or contexts"):
        Tasks.open("other", tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(package.InputError, match="holds no items"):
        Tasks.open("empty", tmp_path)
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe{}\n")
    with pytest.raises(package.InputError, match="not JSON in UTF-8"):
        Tasks.open("bytes", tmp_path)


def test_a_model_in_memory_is_judged_with_its_tokenizer(quiz):
    tasks, model = Tasks.open("quiz", quiz), load(TINY, "cpu", "float32")
    with pytest.raises(package.InputError, match="tasks need"):
        package.evaluate(model, tasks=tasks)
    found = package.evaluate(model, tasks=tasks, tokenizer=load_tokenizer(TINY))
    assert found["tasks"] == package.evaluate(TINY, tasks=tasks, device="cpu", dtype="float32")["tasks"]
    assert found["from"] == {"kind": "memory"} and found["perplexity"] is None


def test_selections_are_not_judged(quiz):
    kept = {"attention": [[0, 1]] * 8, "ffn": [list(range(384))] * 8}
    with pytest.raises(package.InputError, match="selection"):
        package.evaluate(TINY, tasks=Tasks.open("quiz", quiz), selection={"format": 1, "kept": kept})


def test_nan_is_not_an_answer(quiz):
    model = load(TINY, "cpu", "float32")
    model.lm_head.weight.data[7] = float("nan")
    with pytest.raises(PPFError, match="quiz.*NaN"):
        Tasks.open("quiz", quiz).score(model, load_tokenizer(TINY))


def test_lm_eval_missing_or_too_old(quiz, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(harness, "_OLDEST", "99.0")
        assert "99.0 or later" in refusal("eval", TINY, "--tasks", "quiz", "--task-folder", quiz, field="tasks")
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    message = refusal("eval", TINY, "--tasks", "quiz", "--task-folder", quiz, field="tasks", value="quiz")
    assert "lm_eval is not installed" in message and "pip install 'ppf[eval]'" in message


def test_large_perplexities_are_shown_whole_in_a_narrow_terminal():
    figures = {"perplexity": {"value": 3528.5812, "stderr": 4125.919}, "acc": {"value": 0.298, "stderr": None}}
    judged = {"figures": figures, "items": 500, "few_shot": 0, "version": 1}
    console = Console(width=80, file=io.StringIO())
    console.print(tasks_table({"lambada_openai": judged}))
    rows = [line.split() for line in console.file.getvalue().splitlines() if "lambada" in line]
    assert rows == [
        ["lambada_openai", "perplexity", "3,528.6", "4,125.9", "500", "0", "1"],
        ["lambada_openai", "acc", "0.2980", "500", "0", "1"],
    ]


def test_nothing_but_the_commands_own_lines(quiz, tmp_path):
    """In a folder that is no repository of git's, which lm_eval asks about it."""
    command = [sys.executable, "-m", "ppf", "eval", str(TINY), "--tasks", "quiz", "--task-folder", str(quiz), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | ALONE, timeout=300)
    assert done.returncode == 0 and json.loads(done.stdout)["tasks"]["quiz"]["items"] == 4
    assert "git" not in done.stderr, done.stderr


def test_a_task_whose_data_are_out_of_reach(tmp_path):
    """lm_eval's own task, in a process that is offline."""
    offline = ALONE | {"HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "ppf", "eval", str(TINY), "--tasks", "arc_easy"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=os.environ | offline, timeout=300)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and done.stdout == ""
    assert line.startswith("Error: tasks = arc_easy: ") and "--task-folder" in line


@pytest.mark.reference
def test_the_reference_files(reference):
    """All ten open, and a form of each is scored: items as they come from public data sets."""
    folder = reference / "tasks"
    if not folder.is_dir():
        pytest.skip(f"no task files in {folder}")
    names = [file.stem for file in sorted(folder.glob("*.jsonl"))]
    opened = Tasks.open(names, folder, limit=2)
    assert list(opened.found) == names and len(names) == 10
    found = opened.score(load(TINY, "cpu", "float32"), load_tokenizer(TINY))
    assert {name: set(found[name]["figures"]) for name in ("winogrande", "hellaswag", "lambada_openai", "gsm8k")} == {
        "winogrande": {"acc"}, "hellaswag": {"acc", "acc_norm"}, "lambada_openai": {"acc", "perplexity"},
        "gsm8k": {"exact_match"},
    }  # fmt: skip
    assert all(found[name]["items"] == 2 for name in names)
