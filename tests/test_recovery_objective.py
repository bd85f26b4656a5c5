"""What a recovery minimises, in which order it sees the text, and at which rate: against formulas."""

import pytest
import torch
import torch.nn.functional as F
from factories import config_of, llama, llama_config, tokens

from ppf.deliver.recovery import objective
from ppf.deliver.recovery.corpus import Corpus
from ppf.deliver.recovery.head import Head, hidden_states
from ppf.deliver.recovery.objective import Objective
from ppf.deliver.recovery.training import schedule

pytestmark = pytest.mark.usefixtures("one_thread")


def reference_loss(student, teacher, ids, weight):
    """In fp64, with all logits at once."""
    logits = student(ids).logits[:, :-1].double().flatten(0, 1)
    ours = logits - logits.logsumexp(-1, keepdim=True)
    text = -ours.gather(1, ids[:, 1:].reshape(-1, 1)).sum()
    theirs = teacher(ids).logits[:, :-1].double().flatten(0, 1).softmax(-1)
    return (1 - weight) * text + weight * (theirs * (theirs.log() - ours)).sum()


@pytest.mark.parametrize("block", [1 << 26, 258 * 5], ids=["one block", "blocks of 5 tokens"])
@pytest.mark.parametrize(
    ("family", "weight"), [("llama", 0.0), ("llama", 0.3), ("llama", 1.0), ("gemma2", 0.3), ("granite", 0.3)]
)
def test_the_loss_and_its_gradient_are_those_of_the_formula(monkeypatch, block, family, weight):
    """Of families whose logits are capped or scaled, too."""
    monkeypatch.setattr(objective, "_LOGITS", block)
    config = config_of(family, num_hidden_layers=2)
    student, teacher, ids = llama(config, 1), llama(config, 2), tokens(2, 12)
    loss = Objective(Head.of(teacher), weight)(student, ids, hidden_states(teacher, ids).detach())
    expected = reference_loss(student, teacher, ids, weight)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    weights = student.model.layers[0].mlp.down_proj.weight
    ours, theirs = (torch.autograd.grad(value, weights)[0] for value in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_student_like_its_teacher_has_nothing_to_learn_from_it():
    model, other, ids = llama(llama_config(), 1), llama(llama_config(), 2), tokens(2, 12)
    assert float(Objective(Head.of(model), 1.0)(model, ids, hidden_states(model, ids))) == pytest.approx(0, abs=1e-3)
    assert float(Objective(Head.of(other), 1.0)(model, ids, hidden_states(other, ids))) > 10
    # Without a teacher it is the text's cross-entropy.
    expected = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    assert float(Objective(None, 0.5)(model, ids)) == pytest.approx(float(expected), rel=1e-5)


def test_an_epoch_sees_every_sequence_once_and_never_the_held_out_ones():
    sequences = torch.arange(40 * 4).view(40, 4)
    corpus = Corpus.of(sequences)
    assert len(corpus.held_out) == 2 and torch.equal(corpus.held_out, sequences[-2:])
    seen = torch.cat([corpus.batch(step, 8, seed=3) for step in range(19)])  # 152 = 4 epochs of 38
    epochs = seen.view(4, 38, 4)
    for epoch in epochs:
        assert torch.equal(epoch[epoch[:, 0].argsort()], sequences[:38])
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(corpus.batch(7, 8, 3), corpus.batch(7, 8, 3))
    assert not torch.equal(corpus.batch(7, 8, 3), corpus.batch(7, 8, 4))


def test_the_learning_rate_rises_and_falls():
    rates = [schedule(step, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a > b for a, b in zip(rates[4:], rates[5:], strict=False)) and 0 < rates[-1] < 0.01
    assert schedule(0, 1) == 1.0
