"""Selections: any mask of units, scored without surgery, is the model with the other units' outputs zeroed."""

import json
import random

import pytest
import torch
from cli_cases import answer, ppf, refusal
from factories import byte_tokenizer, config_of, llama, model_of, tokens, write_checkpoint, write_text

import ppf as package
from ppf.errors import InputError
from ppf.families import KINDS, families
from ppf.fitting.evaluation.scoring import model_log_perplexity
from ppf.fitting.selection import Selection
from ppf.model.build import pruned_config
from ppf.model.decoder import Decoder
from ppf.model.policy import Policy

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = ("--sequence-length", 32, "--device", "cpu")


def random_selection(structure, seed: int = 0) -> Selection:
    """About half of the units of every sub-layer, in no order; one sub-layer empty, one whole."""
    draw, kept = random.Random(seed), {}
    for kind in KINDS:
        kept[kind] = []
        for sublayer in structure.of(kind):
            count = draw.randint(1, max(1, sublayer.units // sublayer.step)) * sublayer.step
            kept[kind].append(tuple(draw.sample(range(sublayer.units), min(count, sublayer.units))))
    kept["attention"][2], kept["ffn"][1] = (), ()
    kept["ffn"][3] = tuple(range(structure.ffn[3].units))
    return Selection(**{kind: tuple(layers) for kind, layers in kept.items()})


@torch.no_grad()
def zeroed(model, selection: Selection):
    """The model with the output columns of all other units set to zero, in place."""
    decoder = Decoder.of_model(model)
    for index in range(decoder.structure.layers):
        for kind in KINDS:
            sublayer, kept = decoder.structure.of(kind)[index], selection.of(kind)[index]
            if sublayer.units:
                columns = decoder.output(index, kind).view(-1, sublayer.units, sublayer.columns)
                columns[:, [unit for unit in range(sublayer.units) if unit not in kept]] = 0
    return model


@pytest.mark.parametrize("family", [family.model_type for family in families()])
def test_it_is_the_model_with_the_other_units_zeroed(family):
    model, ids = model_of(family), tokens(4, 32)
    selection = random_selection(Decoder.of_model(model).structure)
    whole = package.evaluate(model, ids)["log_perplexity"]
    assert whole == pytest.approx(model_log_perplexity(model, ids), rel=1e-6)
    found = package.evaluate(model, ids, selection)
    assert package.evaluate(model, ids)["log_perplexity"] == whole  # nothing was changed
    expected = model_log_perplexity(zeroed(model, selection), ids)
    assert found["log_perplexity"] == pytest.approx(expected, rel=1e-5) and abs(expected - whole) > 1e-3
    assert found["selection"]["policy"] == selection.policy.to_dict() and 0.2 < found["selection"]["ratio"] < 0.9
    assert found["protocol"]["tokens"] == ids.numel() and found["dtype"] == "float32"


def test_of_a_model_whose_layers_differ():
    config = pruned_config(config_of("qwen3"), Policy([3, 0, 2, 3], [64, 32, 0, 64]))
    model, ids = llama(config), tokens(4, 32)
    selection = Selection(((2, 0), (), (1,), (0, 1, 2)), ((5, 3, 60), tuple(range(32)), (), tuple(range(0, 64, 2))))
    found = package.evaluate(model, ids, selection.to_dict())
    expected = model_log_perplexity(zeroed(model, selection), ids)
    assert found["log_perplexity"] == pytest.approx(expected, rel=1e-5)


def test_everything_kept_in_any_order_is_the_model_itself(tiny_run):
    model, text = tiny_run / "model", tiny_run / "text.txt"
    everything = {"attention": [[2, 0, 1]] * 4, "ffn": [list(range(63, -1, -1))] * 4}
    given = {"sequence_length": 32, "device": "cpu"}
    found = package.evaluate(model, text, {"format": 1, "kept": everything}, **given)
    plain = package.evaluate(model, text, **given)
    assert found["log_perplexity"] == pytest.approx(plain["log_perplexity"], rel=1e-5)
    assert found["protocol"] == plain["protocol"] and found["selection"]["ratio"] == 0 and plain["selection"] is None


def test_texts_begin_as_the_family_wants(tmp_path):
    """Gemma's sequences have the begin token in front, and the protocol says so."""
    folder, text = write_checkpoint(tmp_path / "model", family="gemma3_text"), write_text(tmp_path / "text.txt")
    data = answer("eval", folder, "--text", text, *SHORT)
    assert data["protocol"]["begin"] == 256
    assert "each behind the begin token (256)" in ppf("eval", folder, "--text", text, *SHORT).stdout
    ids = torch.tensor(byte_tokenizer()(text.read_text(), add_special_tokens=False)["input_ids"])
    rows = ids[: len(ids) // 31 * 31].view(-1, 31)
    sequences = torch.cat((torch.full((len(rows), 1), 256), rows), 1)
    assert data["protocol"]["tokens"] == sequences.numel()
    found = package.evaluate(folder, sequences, device="cpu")
    assert found["log_perplexity"] == pytest.approx(data["log_perplexity"], rel=1e-6)


def test_the_command_scores_a_file(tiny_run, tmp_path):
    model, text, file = tiny_run / "model", tiny_run / "text.txt", tmp_path / "selection.json"
    kept = {"attention": [[0, 2], [1], [], [0, 1, 2]], "ffn": [[1, 5, 9], list(range(32)), [], list(range(64))]}
    file.write_text(json.dumps({"format": 1, "kept": kept}))
    data = answer("eval", model, "--text", text, "--selection", file, *SHORT)
    expected = package.evaluate(model, text, file, sequence_length=32, device="cpu")
    assert data["log_perplexity"] == expected["log_perplexity"] and data["selection"] == expected["selection"]
    assert f"{data['selection']['ratio']:.1%}" in ppf("eval", model, "--text", text, "--selection", file, *SHORT).stdout


GOOD = {"attention": [[0, 1, 2]] * 4, "ffn": [[0, 1]] * 4}
REFUSED = {
    "out of range": ({"ffn": [[0], [0, 64], [0], [0]]}, "selection.ffn[1]", 64),
    "negative": ({"attention": [[0], [-1], [0], [0]]}, "selection.attention[1]", -1),
    "twice": ({"ffn": [[0], [3, 4, 3], [0], [0]]}, "selection.ffn[1]", 3),
    "layers": ({"ffn": [[0]] * 3}, "selection.ffn", "3 lists"),
    "layer 0": ({"attention": [[], [0], [0], [0]]}, "selection.attention[0]", "[]"),
    "no list": ({"ffn": [[0], 5, [0], [0]]}, "selection.kept.ffn[1]", 5),
    "no lists": ({"ffn": 5}, "selection.kept.ffn", "int"),
    "fractions": ({"ffn": [[0], [0.5], [0], [0]]}, "selection.kept.ffn[1]", 0.5),
    "truth values": ({"ffn": [[0], [True], [0], [0]]}, "selection.kept.ffn[1]", True),
    "another kind": ({"experts": [[0]] * 4}, "selection.kept", "experts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_model_can_keep_is_refused(tiny_run, tmp_path, case):
    change, field, value = REFUSED[case]
    (tmp_path / "selection.json").write_text(json.dumps({"format": 1, "kept": GOOD | change}))
    given = "eval", tiny_run / "model", "--text", tiny_run / "text.txt", *SHORT
    refusal(*given, "--selection", tmp_path / "selection.json", field=field, value=value)


@pytest.mark.parametrize(("content", "field"), [("{", "selection"), (None, "selection"), ("[]", "selection.format")])
def test_files_that_are_not_selections_are_refused(tiny_run, tmp_path, content, field):
    if content is not None:
        (tmp_path / "selection.json").write_text(content)
    given = "eval", tiny_run / "model", "--text", tiny_run / "text.txt", *SHORT
    refusal(*given, "--selection", tmp_path / "selection.json", field=field)
    policy = tmp_path / "policy.json"
    policy.write_text(Policy([3] * 4, [64] * 4).to_json())
    refusal(*given, "--selection", policy, field="selection.format", value=2)


def test_units_that_only_go_together_are_kept_together():
    structure = Decoder.of_model(model_of("olmo2")).structure
    with pytest.raises(InputError, match="only go together"):
        Selection(((0,),) * 4, ((0, 1),) * 4).check(structure)


def test_what_evaluate_cannot_read_is_refused(tmp_path):
    model = model_of("llama")
    with pytest.raises(InputError, match="this text needs"):
        package.evaluate(model, tmp_path / "text.txt")
    with pytest.raises(InputError, match="are not token sequences"):
        package.evaluate(model, torch.zeros(3))
