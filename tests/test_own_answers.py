"""The model's own answers as calibration: what is generated, which positions count, and a fit on them."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cli_cases import answer, refusal
from factories import byte_tokenizer, dense_weights, model_of, quick_learning, tokens, write_checkpoint, write_text

import ppf
from ppf.checkpoint.hashes import sha256_of
from ppf.errors import InputError
from ppf.fitting.calibration import calibrate
from ppf.fitting.evaluation import Evaluator
from ppf.fitting.evaluation.scoring import model_log_perplexity
from ppf.fitting.own_answers import Answers, OwnAnswers
from ppf.fitting.ranking.gradient import gradient_scores
from ppf.fitting.run import Settings
from ppf.model.grid import Grid
from ppf.text import Text, predicting, unpadded

pytestmark = pytest.mark.usefixtures("one_thread")
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
WORDS = [
    "The river",
    "Old",
    "Walls at dawn",
    "Past",
    "A stone ran",
    "Dusk and",
    "Go",
    "When",
    "It is",
    "No",
    "Yes",
    "Far",
]
SETTINGS = Settings(sequence_length=48, calibration_tokens=96, evaluation_tokens=32, evaluations=24, ffn_multiple=8)
QUICK = ["--device", "cpu", "--sequence-length", 48, "--calibration-tokens", 96, "--evaluation-tokens", 32]
QUICK += ["--evaluations", 24, "--ffn-multiple", 8]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A checkpoint whose tokenizer knows chats."""
    folder = write_checkpoint(tmp_path_factory.mktemp("model") / "model")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    """Chats that have an answer already, which is not the model's own."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    chats = [[{"role": "user", "content": word}, {"role": "assistant", "content": "Theirs."}] for word in WORDS]
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return file


def answers(model: Path, text: Text, count: int = 12, temperature: float = 0.0, **changes) -> Answers:
    settings = Settings(**(SETTINGS.to_dict() | changes))
    return Answers(model, OwnAnswers(text, count, temperature), settings, torch.device("cpu"))


def ids_of(text: str) -> list[int]:
    return byte_tokenizer()(text)["input_ids"]


def greedy(loaded, ids: list[int], count: int) -> list[int]:
    """By hand: one prompt, one token after the other."""
    found = []
    while len(found) < count and 257 not in found:
        found.append(int(loaded(torch.tensor([ids + found])).logits[0, -1].argmax()))
    return found


def test_prompts_are_answered_as_the_model_alone_would(model, prompts):
    """Prompts of different lengths in one batch; a chat ends before the answer that it brings."""
    loaded = ppf.checkpoint.load(model)
    given = answers(model, Text(str(prompts), field="messages"))
    splits = given.splits(evaluates=True)
    asked = [ids_of(f"<user>{word}<a>") for word in WORDS]
    pairs = [(prompt, greedy(loaded, prompt, 12)) for prompt in asked]
    pairs = [(prompt, found) for prompt, found in pairs if found != [257]]
    rows = [*zip(splits.calibration, splits.calibration_scored, strict=True)]
    held = [*zip(splits.evaluation, splits.evaluation_scored, strict=True)]
    taken = len(rows) + len(held)
    assert len(rows) > 4 and len(held) > 1 and taken > 8
    for (prompt, found), (ids, scored) in zip(pairs[: len(rows)], rows, strict=True):
        assert ids[: len(prompt) + len(found)].tolist() == prompt + found
        assert scored.nonzero().flatten().tolist() == list(range(len(prompt), len(prompt) + len(found)))
    last = [ids[scored].tolist() for ids, scored in held]
    found = [found for _, found in pairs]
    assert last in (found[-len(held) :], found[-len(held) - 1 : -1])  # as many as are needed
    facts = given.facts
    assert facts["calibration"]["tokens"] == int(splits.calibration_scored.sum())
    assert facts["sha256"] == sha256_of(prompts) and facts["read_as"].startswith("chat template")


def test_the_seed_decides_what_is_drawn(model):
    before = torch.random.get_rng_state()
    few = {"temperature": 1.0, "calibration_tokens": 24}
    drawn = [answers(model, Text(WORDS), **few, seed=seed).splits(evaluates=False) for seed in (1, 1, 2)]
    assert torch.equal(before, torch.random.get_rng_state())
    first, again, other = (splits.calibration for splits in drawn)
    assert torch.equal(first, again) and not torch.equal(first[0, :12], other[0, :12])


def test_texts_are_prompts_as_they_are_and_lines_of_a_plain_text_too(model, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n\n".join(WORDS) + "\n")
    of_lines, of_python = (
        answers(model, Text(given), 6, calibration_tokens=24).splits(evaluates=False) for given in (file, WORDS)
    )
    assert torch.equal(of_lines.calibration, of_python.calibration) and of_lines.evaluation_scored is None
    assert of_lines.calibration[0, : len(WORDS[0])].tolist() == ids_of(WORDS[0])


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_statistics_are_those_of_the_positions_that_predict_what_counts(family):
    """By hooks on transformers' model, and whatever stands behind the last token that counts."""
    loaded, ids = model_of(family), tokens(5, 30)
    scored = torch.rand(5, 30, generator=torch.Generator().manual_seed(3)) < 0.3
    scored[:, 20:] = False
    seen = []
    loaded.model.layers[2].mlp.down_proj.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        loaded(ids)
    x = seen[0][:, :-1][scored[:, 1:]].double()
    other = ids.clone()
    other[:, 20:] = 7
    for given in (ids, other):
        found = list(calibrate(ppf.model.decoder.Decoder.of_model(loaded), given, scored))[2].ffn
        gram = x.T @ x / len(x)
        torch.testing.assert_close(found.gram.double(), gram, rtol=1e-4, atol=float(1e-5 * gram.diagonal().max()))
        torch.testing.assert_close(found.mean.double(), x.mean(0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["taylor", "loraprune"])
def test_gradient_rankings_look_at_the_loss_of_what_counts(name, monkeypatch):
    """Rows without a token that counts might as well not be there; which tokens count in the others matters."""
    for constant, value in (("_STEPS", 1), ("_STEP_TOKENS", 8 * 24)):  # one step, on all rows
        monkeypatch.setattr(f"ppf.fitting.ranking.gradient.{constant}", value)
    _, decoder = dense_weights()
    ids = torch.cat((tokens(4, 24), tokens(4, 24, seed=9)))
    half = torch.zeros(8, 24, dtype=torch.bool)
    half[:4] = True
    late = half.clone()
    late[:, :12] = False
    alone, masked, of_late = (
        gradient_scores(name, decoder, rows, 0, scored) for rows, scored in ((ids[:4], None), (ids, half), (ids, late))
    )
    for layer, other, third in zip(alone, masked, of_late, strict=True):
        for kind in layer:
            torch.testing.assert_close(layer[kind], other[kind], rtol=1e-3, atol=1e-7)
            assert not torch.allclose(layer[kind], third[kind], rtol=1e-2)


def test_evaluation_is_of_what_counts():
    loaded, decoder = dense_weights()
    grid, ids = Grid(decoder.structure, 8), tokens(5, 24)
    scored = torch.rand(5, 24, generator=torch.Generator().manual_seed(1)) < 0.4
    losses = F.cross_entropy(loaded(ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    expected = pytest.approx(float(losses[scored[:, 1:]].mean()), rel=1e-5)
    evaluator = Evaluator(decoder, grid, ids, scored=scored)
    assert evaluator.log_perplexity(grid.dense()) == expected
    assert model_log_perplexity(loaded, ids, counted=scored) == expected
    assert evaluator.log_perplexity(grid.dense()) != pytest.approx(float(losses.mean()), rel=1e-4)
    part = Evaluator(decoder, grid, ids[[0, 2]], scored=scored[[0, 2]]).log_perplexity(grid.dense())
    assert evaluator.log_perplexity(grid.dense(), tokens=48) == pytest.approx(part, rel=1e-5)


def test_masks_by_hand():
    scored = torch.tensor([[0, 0, 1, 1, 0], [0, 1, 0, 0, 0]]).bool()
    assert predicting(scored).int().tolist() == [[0, 1, 1, 0, 0], [1, 0, 0, 0, 0]]
    ids = torch.arange(10).view(2, 5)
    assert unpadded(ids, scored).tolist() == [[0, 1, 2, 3, 5]]


def test_a_fit_on_own_answers(model, prompts, tmp_path, monkeypatch):
    """Twice the same run; what was generated stands in it; a result is measured on the answers that were held out."""
    quick_learning(monkeypatch)
    own = ["--own-answers", prompts, "--prompt-field", "messages", "--answer-tokens", 12]
    facts = answer("fit", model, *own, "--output", tmp_path / "run", *QUICK)
    run = ppf.Run(tmp_path / "run")
    held = run.manifest["own_answers"]
    assert facts["own_answers"] == held and held["sha256"] == sha256_of(prompts) and held["seed"] == 0
    assert run.manifest["texts"]["own_answers"]["tokens"] == 12 and run.manifest["texts"]["text"] is None
    assert held["evaluation"]["tokens"] == int(run.scored().sum()) > 0
    settings = run.settings
    asked = {"own_answers": Text(str(prompts), field="messages"), "answer_tokens": 12, "device": "cpu"}
    again = ppf.fit(model, None, tmp_path / "again", settings=settings, **asked)
    for part in ("calibration", "evaluation"):
        assert torch.equal(run.sequences(part), again.sequences(part)) and torch.equal(
            run.scored(part), again.scored(part)
        )
    policy = run.policy(ratio=0.3).policy
    report = run.prune(policy=policy, device="cpu").save_pretrained(tmp_path / "out")
    measured, protocol = report["measured"], report["measured"]["protocol"]
    assert measured["perplexity"] == pytest.approx(run.evaluate(policy, device="cpu")["perplexity"], rel=1e-4)
    assert protocol["tokens"] == held["evaluation"]["tokens"] and "own answers" in protocol["part"]
    assert protocol["read_as"]["own_answers"]["temperature"] == 1.0
    monkeypatch.setattr("ppf.fitting.own_answers.generate", None)  # a finished run is not answered again
    assert ppf.fit(model, None, tmp_path / "run", settings=settings, **asked).is_complete
    with pytest.raises(InputError, match="other own answers"):
        ppf.fit(model, None, tmp_path / "run", settings=settings, **asked | {"answer_tokens": 11})


def test_a_text_evaluates_as_it_would_alone(model, prompts, tmp_path):
    """The last quarter of the text, so that figures stand beside those of a fit on the text."""
    from ppf.fitting.texts import Texts

    text, own = write_text(tmp_path / "text.txt"), Text(str(prompts), field="messages")
    alone = Texts(model, text, None, SETTINGS).splits()
    beside = Texts(model, text, None, SETTINGS, answers(model, own)).splits()
    assert torch.equal(alone.evaluation, beside.evaluation) and beside.evaluation_scored is None
    assert beside.calibration_scored.any() and not torch.equal(alone.calibration[:1, :20], beside.calibration[:1, :20])
    judged = Texts(model, None, text, SETTINGS, answers(model, own)).splits()
    assert len(judged.evaluation) and judged.evaluation_scored is None
    with pytest.raises(InputError, match="is used for nothing"):
        Texts(model, text, text, SETTINGS, answers(model, own))


def lines(path: Path, *values: object, field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: value}) + "\n" for value in values))
    return path


@pytest.mark.parametrize(
    ("content", "options", "field", "says"),
    [
        ([], [], "own-answers", "no prompt"),
        (["Where"], ["--answer-tokens", 0], "answer-tokens", "Use a whole number"),
        (["Where"], ["--answer-tokens", 48], "answer-tokens", "no room for a prompt"),
        (["Where"], ["--answer-temperature", -1], "answer-temperature", "Use "),
        (["Where", "x" * 200], ["--answer-tokens", 8], "own-answers", "prompt 2 has 200 tokens"),
        (["Where", "x" * 60], ["--answer-tokens", 8], "own-answers", "--sequence-length 68"),
        (["Where"], ["--prompt-field", "question"], "own-answers", "has no field 'question'"),
        ([[{"role": "system", "content": "Be."}]], [], "own-answers", "no message of a user"),
        (["Where"], ["--answer-tokens", 8, "--weights", "disk"], "own-answers", "these stream"),
        (["Where"], ["--answer-tokens", 8, "--answer-temperature", 0], "own-answers", "cannot both"),
    ],
)
def test_what_is_wrong_with_prompts_is_said_before_anything_is_written(model, tmp_path, content, options, field, says):
    file = lines(tmp_path / "prompts.jsonl", *content)
    options = options if "--answer-tokens" in options else ["--answer-tokens", 8, *options]
    message = refusal("fit", model, "--own-answers", file, "--output", tmp_path / "run", *QUICK, *options, field=field)
    assert says in message and not (tmp_path / "run").exists()


def test_a_model_that_ends_at_once_has_no_answers(tmp_path):
    """The last norm gives zeros, so that all logits are equal, and the first token is the end."""
    loaded = model_of("llama", eos_token_id=0)
    torch.nn.init.zeros_(loaded.model.norm.weight)
    loaded.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="answers none of the 2 prompts"):
        answers(tmp_path / "model", Text(["Where", "Why"])).splits(evaluates=False)


def test_nothing_to_calibrate_on_and_nothing_to_answer(model, tmp_path):
    arguments = ["fit", model, "--output", tmp_path / "run", *QUICK]
    assert "--own-answers" in refusal(*arguments, field="text")
    assert "no prompts" in refusal(*arguments, "--text", "t.txt", "--answer-tokens", 8, field="answer-tokens", value=8)
    assert not (tmp_path / "run").exists()
