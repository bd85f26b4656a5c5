"""Bars of a policy: one line a layer, against what that layer has."""

import pytest
from cli_cases import ppf
from factories import config_of, llama

from ppf.model.build import pruned_config
from ppf.model.policy import Policy

pytestmark = pytest.mark.usefixtures("one_thread")


def test_bars_stand_beside_what_their_own_layer_has(tmp_path):
    """Of a model whose layers differ: layer 1 has no attention, layer 2 no FFN."""
    config = pruned_config(config_of("llama"), Policy([3, 0, 2, 1], [64, 32, 0, 8]))
    llama(config).save_pretrained(tmp_path / "model")
    lines = ppf("info", tmp_path / "model").stdout.splitlines()
    assert "4 layers, hidden 48, 0 to 3 kv-groups of 2 heads x 8, 0 to 64 FFN channels" in "\n".join(lines)
    bars = [line.split() for line in lines[-4:]]
    full = "█" * 24
    assert bars[0] == ["0", full, "3/3", full, "64/64"] and bars[1] == ["1", "-", full, "32/32"]
    assert bars[2] == ["2", full, "2/2", "-"] and bars[3] == ["3", full, "1/1", full, "8/8"]
