"""Bars of a policy: one line a layer, against what that layer has."""

import pytest
from cli_cases import ppf
from factories import config_of, llama

from ppf.cli.bars import policy_bars
from ppf.families import family_of
from ppf.model.build import pruned_config
from ppf.model.geometry import structure_of
from ppf.model.policy import Policy

pytestmark = pytest.mark.usefixtures("one_thread")


def test_bars_stand_beside_what_their_own_layer_has(tmp_path):
    """Of a model whose layers differ: layer 1 has no attention, layer 2 no FFN. Beside itself, and beside the dense
    model that its configuration tells of."""
    policy = Policy([3, 0, 2, 1], [64, 32, 0, 8])
    config = pruned_config(config_of("llama"), policy)
    llama(config).save_pretrained(tmp_path / "model")
    full, half = "█" * 24, "█" * 12 + "░" * 12
    bars = [line.split() for line in policy_bars(policy, structure_of(family_of("llama"), config)).splitlines()[-4:]]
    assert bars[0] == ["0", full, "3/3", full, "64/64"] and bars[1] == ["1", "-", full, "32/32"]
    assert bars[2] == ["2", full, "2/2", "-"] and bars[3] == ["3", full, "1/1", full, "8/8"]
    shown = ppf("info", tmp_path / "model").stdout
    assert "4 layers, hidden 48, 3 kv-groups of 2 heads x 8, 64 FFN channels" in shown
    assert shown.splitlines()[-3].split() == ["1", "░" * 24, "0/3", half, "32/64"]
