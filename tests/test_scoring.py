"""Perplexity of real models, against the plain formula in fp64 and against the masked evaluation."""

import pytest
import torch
import torch.nn.functional as F
from factories import llama, llama_config, model_of, tokens
from transformers import CohereConfig, CohereForCausalLM, GemmaConfig, GemmaForCausalLM

from ppf.errors import InputError, PPFError
from ppf.families import families
from ppf.fast import losses
from ppf.fitting.evaluation.scoring import in_compute_dtype, model_log_perplexity
from ppf.fitting.run import Run
from ppf.fitting.session import Session

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {
    "vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip


def exact(model, sequences) -> float:
    """The definition, in fp64, one sequence at a time, from whole logits."""
    model = model.double()
    losses = [F.cross_entropy(model(row[None]).logits[0, :-1], row[1:], reduction="none") for row in sequences]
    return torch.cat(losses).mean().item()


@pytest.mark.parametrize("shape", [(1, 2), (3, 24), (5, 17)])
@pytest.mark.parametrize("tied", [False, True])
def test_equals_the_definition(shape, tied):
    model, sequences = llama(llama_config(tie_word_embeddings=tied)), tokens(*shape)
    value = model_log_perplexity(model, sequences)
    assert value == pytest.approx(exact(model, sequences), rel=1e-5)
    other = sequences.clone()
    other[0, -1] = (other[0, -1] + 1) % 256  # the last token is scored too
    assert model_log_perplexity(model.float(), other) != pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("family", [f.model_type for f in families()])
def test_every_family(family):
    """Capped and scaled logits among them."""
    model, sequences = model_of(family), tokens(3, 24)
    value = model_log_perplexity(model, sequences)
    assert value == pytest.approx(exact(model, sequences), rel=1e-5)


def test_an_architecture_that_is_no_family_of_ours():
    model, sequences = GemmaForCausalLM(GemmaConfig(**SMALL)).eval(), tokens()
    assert model_log_perplexity(model, sequences) == pytest.approx(exact(model, sequences), rel=1e-5)


def test_logits_that_are_something_else_are_refused_not_misjudged():
    small = {name: value for name, value in SMALL.items() if name != "head_dim"}
    model = CohereForCausalLM(CohereConfig(**small, logit_scale=0.05)).eval()
    model.model.embed_tokens.weight.data *= 30  # so that logits are far from zero
    with pytest.raises(InputError, match="CohereForCausalLM.*not its output embedding"):
        model_log_perplexity(model, tokens())


def test_blocks_do_not_change_the_value(monkeypatch):
    model, sequences = llama(llama_config()), tokens(4, 50)
    whole, largest, linear = model_log_perplexity(model, sequences), [], F.linear

    def watched(x, weight, *rest):
        if weight is model.lm_head.weight:
            largest.append(x.shape[:-1].numel())
        return linear(x, weight, *rest)

    monkeypatch.setitem(losses._LOGIT_BYTES, "cpu", 7 * 4 * 258)
    monkeypatch.setattr(losses, "_LEAST_BLOCK", 1)
    monkeypatch.setattr(F, "linear", watched)
    assert model_log_perplexity(model, sequences) == pytest.approx(whole, rel=1e-7)
    assert max(largest[2:]) == 7  # after the two of the probe of eight tokens


def test_every_batch_counts(monkeypatch):
    """Several batches give what one gives, and progress ends at the number of tokens."""
    model, sequences, calls = llama(llama_config()), tokens(9, 20), []
    whole = model_log_perplexity(model, sequences)
    monkeypatch.setattr("ppf.fitting.evaluation.scoring.batches", lambda s, *_: s.split(2))
    value = model_log_perplexity(model, sequences, lambda *call: calls.append(call))
    assert value == pytest.approx(whole, rel=1e-7)
    assert calls[-1] == ("score", 180, 180) and [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)


def test_masked_evaluation_and_materialised_model_agree(tiny_run):
    run = Run(tiny_run / "run")
    session = Session(run, "cpu")
    evaluator = session.evaluator()
    for ratio in (0.2, 0.5):
        policy = run.policy(ratio).policy
        measured = model_log_perplexity(session.materialize(policy), run.sequences())
        assert measured == pytest.approx(evaluator.log_perplexity(policy), rel=1e-5)
        assert measured != pytest.approx(evaluator.log_perplexity(run.grid.dense()), rel=1e-5)


def test_a_result_that_is_not_finite_is_an_error():
    model = llama(llama_config())
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(PPFError, match="nan"):
        model_log_perplexity(model, tokens())


def test_compute_dtype_leaves_the_original_alone():
    half, full = llama(llama_config(), dtype=torch.float16), llama(llama_config())
    computing = in_compute_dtype(half)
    assert computing.dtype is torch.float32 and half.dtype is torch.float16
    assert all(p.dtype is torch.float16 for p in half.parameters())
    assert in_compute_dtype(full) is full
