"""Answers from calibration alone: curvatures are the loss's own, sums are minimised, few evaluations do no harm."""

import pytest
import torch
from factories import llama, llama_config, write_checkpoint, write_text
from structures import irregular_structure, llama_structure
from transformers import AutoModelForCausalLM

import ppf
from ppf.choose.additive import Additive
from ppf.choose.agent import Agent
from ppf.choose.answers import Answers
from ppf.choose.budget import RatioBudget
from ppf.choose.candidates.sampling import uniform_policy
from ppf.choose.measured import Measured
from ppf.choose.predictor.base import Prediction
from ppf.errors import InputError
from ppf.fitting.curvature import Curvatures, curvatures
from ppf.fitting.first import damages
from ppf.fitting.search.exploration import initial_proposals
from ppf.lab.peers.puzzle import solve
from ppf.model.decoder import Decoder
from ppf.model.grid import Grid

pytestmark = pytest.mark.usefixtures("one_thread")
GRID = Grid(llama_structure(4, 48, 3, 2, 8, 64), 8)
QUICK = {"ffn_multiple": 8, "sequence_length": 32, "calibration_tokens": 2048, "device": "cpu"}


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory) -> ppf.Run:
    """A run of the tiny model without evaluations."""
    folder = tmp_path_factory.mktemp("first")
    write_checkpoint(folder / "model")
    write_text(folder / "text.txt")
    return ppf.fit(folder / "model", folder / "text.txt", folder / "run", evaluations=0, **QUICK)


def drawn_damage(grid: Grid, seed: int = 0) -> torch.Tensor:
    """Convex in the level, of sub-layers that differ a hundredfold."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp(4.6 * torch.rand(grid.sublayers, 1, generator=generator, dtype=torch.float64))
    lost = (1 - torch.arange(grid.levels) / torch.tensor(grid.top)[:, None]).clamp_min(0).double()
    return size * lost.square()


def test_curvatures_are_those_of_gates_in_the_model_itself():
    """Gates on the sub-layers of transformers' own model, by its own backward pass, for the tokens that it draws."""
    model = llama(llama_config())
    tokens = torch.randint(model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(3))
    found = curvatures(Decoder.of_model(model), tokens, seed=5)
    outputs, streams = [], []
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            part.register_forward_hook(lambda _, __, y: outputs.append(y[0] if isinstance(y, tuple) else y))
        layer.register_forward_pre_hook(
            lambda _, a, k: streams.append(a[0] if a else k["hidden_states"]), with_kwargs=True
        )
    generator, sums, shares = torch.Generator().manual_seed(5), 0, [0, 0]
    for row in tokens.split(1):
        outputs.clear(), streams.clear()
        scores = model(row).logits[0].log_softmax(-1)
        place = torch.rand(row.shape[1], generator=generator)
        drawn = (scores.exp().cumsum(-1) < place[:, None]).sum(-1).clamp_max(scores.shape[1] - 1)
        chosen = scores.gather(1, drawn[:, None])[:-1, 0].sum()  # the last position predicts nothing
        slopes = torch.autograd.grad(chosen, outputs)
        sums = sums + torch.stack([(y * s).sum(-1).square().sum() for y, s in zip(outputs, slopes, strict=True)])
        shares[0] = shares[0] + torch.stack([y.square().sum() for y in outputs])
        stream = [x + add for x, y in zip(streams, outputs[::2], strict=True) for add in (0, y)]
        shares[1] = shares[1] + torch.stack([x.square().sum() for x in stream])
    gate, share = sums / (2 * 30), shares[0] / shares[1]
    for ours, theirs in ((found.gate, gate), (found.share, share)):
        by_kind = torch.cat((theirs[::2], theirs[1::2])).double()  # attention of all layers first
        torch.testing.assert_close(ours, by_kind, rtol=1e-4, atol=1e-9)


def test_damages_weigh_energies_with_the_mean_of_both_witnesses():
    energies = torch.tensor([[1.0, 0.25, 0.0]])
    found = damages(energies, Curvatures(gate=torch.tensor([0.2]), share=torch.tensor([0.8])))
    torch.testing.assert_close(found, torch.tensor([[0.4, 0.1, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("grid", [GRID, Grid(irregular_structure(), 16)], ids=["regular", "irregular"])
def test_the_sum_is_as_low_as_an_integer_program_gets_it(grid):
    damage = drawn_damage(grid)
    first = Additive(grid, damage)
    columns = [damage[s, low : high + 1] for s, (low, high) in enumerate(zip(grid.minimum, grid.maximum, strict=True))]
    for ratio in (0.1, 0.3, 0.5):
        budget = RatioBudget(grid, ratio)
        ours = first(torch.tensor([ratio], dtype=torch.float64))
        best = grid.encode([solve(columns, budget)])
        step = float(damage.diff(dim=1).abs().amax(1).median())
        assert float(first.total(ours)) <= float(first.total(best)) + step
        assert abs(budget.cost(grid.decode(ours)[0]) - budget.target) <= abs(
            budget.cost(solve(columns, budget)) - budget.target
        ) + min(grid.step_cost)


def test_a_run_without_evaluations_answers_and_says_so(calibrated, tmp_path):
    step = min(calibrated.grid.step_cost) / calibrated.structure.decoder_parameters
    for ratio in (0.1, 0.3, 0.6):
        answer = calibrated.policy(ratio)
        assert answer.source == "calibration" and answer.predicted_log_perplexity is None is answer.predicted_std
        assert abs(answer.delivered_ratio - ratio) <= step / 2 + 1e-6
    assert len(calibrated.experience) == 0 and not (calibrated.path / "agent.safetensors").exists()
    report = calibrated.prune(ratio=0.3).save_pretrained(tmp_path / "out")
    assert report["policy_from"] == "calibration" and report["predicted"] is None and report["dense"] is None
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert ppf.Run(calibrated.path).policy(0.3).policy == calibrated.policy(0.3).policy


def test_what_needs_evaluations_is_refused(calibrated):
    for ask in (
        lambda: calibrated.prune(ratio=0.3, search=8),
        lambda: calibrated.prune(ratio=0.3, portable=True),
        lambda: calibrated.predict(calibrated.grid.dense()),
    ):
        with pytest.raises(InputError) as caught:
            ask()
        assert caught.value.field == "run" and "without evaluations" in str(caught.value)


def test_a_damaged_first_answer_is_refused(calibrated, tmp_path):
    import shutil

    copied = shutil.copytree(calibrated.path, tmp_path / "run")
    data = bytearray((copied / "first.safetensors").read_bytes())
    data[-9] ^= 64
    (copied / "first.safetensors").write_bytes(data)
    with pytest.raises(InputError, match=r"first\.safetensors"):
        ppf.Run(copied).policy(0.3)


def test_the_first_round_measures_what_calibration_says():
    first = Additive(GRID, drawn_damage(GRID))
    found = initial_proposals(GRID, 40, 0, first)
    told = [policy for policy, source in found if source == "calibration"]
    ratios = (0.1, 0.2, 0.3, 0.4, 0.5)
    expected = [GRID.decode(first(torch.tensor([r], dtype=torch.float64)))[0] for r in ratios]
    assert told == expected and len(found) == 40


class _Opinion(torch.nn.Module):
    """Predicts what it is told for three policies."""

    def __init__(self, told: dict):
        super().__init__()
        self.told = told

    def forward(self, levels):
        found = torch.tensor([self.told[policy] for policy in GRID.decode(levels)])
        return Prediction(found[:, 0], found[:, 1])


@pytest.mark.parametrize(
    ("opinions", "winner"),
    [
        ({"agent": (3.0, 0.1), "calibration": (3.2, 0.1), "uniform": (3.5, 0.1)}, "agent"),
        ({"agent": (3.0, 0.9), "calibration": (3.2, 0.1), "uniform": (3.5, 0.1)}, "calibration"),
        ({"agent": (3.0, 0.9), "calibration": (3.2, 0.6), "uniform": (3.5, 0.1)}, "uniform"),
    ],
)
def test_the_most_promising_offer_wins_with_its_uncertainty(opinions, winner):
    agent, first = Agent(GRID, seed=3), Additive(GRID, drawn_damage(GRID))
    with torch.no_grad():
        agent.network[4].weight.normal_(generator=torch.Generator().manual_seed(1))
    ratio = torch.tensor([0.3], dtype=torch.float64)
    offers = {"agent": GRID.decode(agent(ratio))[0], "calibration": GRID.decode(first(ratio))[0]}
    offers["uniform"] = uniform_policy(GRID, 0.3)
    assert len(set(offers.values())) == 3
    answers = Answers(GRID, agent, _Opinion({offers[name]: opinion for name, opinion in opinions.items()}), first)
    found = answers(RatioBudget(GRID, 0.3))
    assert found.source == winner and GRID.decode(found.levels)[0] == offers[winner]
    assert GRID.decode(answers.at(ratio))[0] == offers[winner]
    told = answers.predictor.told
    untried = Answers(GRID, agent, _Opinion(told), first, trusted=False)(RatioBudget(GRID, 0.3))
    assert untried.source == ("uniform" if winner == "uniform" else "calibration")


def test_what_was_measured_near_a_budget_is_moved_onto_it():
    """An agent that has learnt nothing is beaten by a good policy that was measured a little beside the budget."""
    agent, first = Agent(GRID, seed=3), Additive(GRID, drawn_damage(GRID))
    good = GRID.encode([GRID.decode(first(torch.tensor([0.31], dtype=torch.float64)))[0]])
    far = GRID.encode([uniform_policy(GRID, 0.6)])
    measured = Measured(GRID, torch.cat((far, good)), torch.tensor([1.0, 3.0], dtype=torch.float64))

    class Near(torch.nn.Module):
        """Predicts the distance from ``good``."""

        def forward(self, levels):
            off = (levels - good).abs().sum(1).double()
            return Prediction(off, torch.zeros_like(off))

    answers = Answers(GRID, agent, Near(), None, measured=measured)
    asked = RatioBudget(GRID, 0.3)
    found = answers(asked)
    assert found.source == "measured" and asked.is_met(GRID.ratio(GRID.decode(found.levels)[0]))
    several = torch.tensor([0.3, 0.5, 0.1], dtype=torch.float64)  # nothing was measured near the last two
    expected = torch.cat([answers(RatioBudget(GRID, float(ratio))).levels for ratio in several])
    assert torch.equal(answers.at(several), expected)
    assert answers(RatioBudget(GRID, 0.1)).source in ("agent", "uniform")
    assert torch.equal(answers.at(several[1:]), expected[1:])
