"""What other packages' results are counted and scored by (benchmarks/outside/common.py): as PPF counts and scores."""

import runpy
from types import SimpleNamespace

import pytest
import torch
from factories import TINY, llama, llama_config, model_of
from transformers import AutoTokenizer

import ppf
from ppf.families import family_of
from ppf.model.geometry import structure_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def common(request) -> SimpleNamespace:
    """The module, which is no part of a package."""
    return SimpleNamespace(**runpy.run_path(str(request.config.rootpath / "benchmarks" / "outside" / "common.py")))


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # without biases and with
def test_decoder_parameters_are_those_that_ratios_are_of(common, family):
    model = model_of(family)
    structure = structure_of(family_of(model.config.model_type), model.config)
    assert common.decoder_parameters(model) == structure.decoder_parameters
    ffn = sum(sublayer.units * sublayer.cost for sublayer in structure.ffn)
    assert common.ffn_share(model) == ffn / structure.decoder_parameters


def test_perplexity_is_that_of_ppf(common):
    model, tokens = llama(llama_config()), torch.randint(258, (3, 24), generator=torch.Generator().manual_seed(2))
    assert common.perplexity(model, tokens) == pytest.approx(ppf.evaluate(model, tokens)["perplexity"], rel=1e-6)


def test_the_beginning_of_a_text_has_the_same_first_tokens(common, tmp_path):
    """PPF reads a file that holds the beginning only; what is scored in memory comes from the whole."""
    tokenizer, whole, cut = AutoTokenizer.from_pretrained(TINY), tmp_path / "whole.txt", tmp_path / "cut.txt"
    whole.write_text("naïve readers — of Paris — " * 200, encoding="utf-8")
    cut.write_text(common.beginning(tokenizer, whole, 256), encoding="utf-8")
    assert len(cut.read_text(encoding="utf-8")) < len(whole.read_text(encoding="utf-8"))
    sequences = [common.sequences(tokenizer, path, 256, 64) for path in (whole, cut)]
    assert sequences[0].shape == (4, 64)
    assert torch.equal(*sequences)
    with pytest.raises(SystemExit, match="fewer than 512"):
        common.sequences(tokenizer, cut, 512, 64)
