"""Policies: immutable maps of whole numbers, and their versioned JSON."""

import json
from collections.abc import Mapping

import numpy as np
import pytest
import torch

from ppf.errors import InputError
from ppf.model.policy import FORMAT, Policy


def written(**widths) -> str:
    """The JSON of a policy with these lists."""
    return json.dumps({"format": FORMAT, "widths": widths})


def test_json_round_trip_and_hash():
    policy = Policy([2, 0, 1], [64, 128, 0])
    again = Policy.from_json(policy.to_json())
    assert again == policy and hash(again) == hash(policy) and len({again, policy}) == 1
    assert policy != Policy([2, 1, 0], [64, 128, 0]) and policy != {"attention": (2, 0, 1), "ffn": (64, 128, 0)}
    assert Policy.from_dict(policy.to_dict()) == policy


def test_the_file_is_a_versioned_map_of_kinds():
    """What other programs read: must not change without a new version."""
    expected = {"format": 2, "widths": {"attention": [2, 0], "ffn": [64, 8]}}
    assert json.loads(Policy([2, 0], [64, 8]).to_json()) == expected == Policy([2, 0], [64, 8]).to_dict()


def test_a_map_from_kinds_to_widths():
    policy = Policy([2, 0], [64, 8])
    assert isinstance(policy, Mapping) and list(policy) == ["attention", "ffn"] and len(policy) == 2
    assert dict(policy) == {"attention": (2, 0), "ffn": (64, 8)} and policy["ffn"] is policy.ffn
    assert "experts" not in policy and policy.get("experts") is None
    assert eval(repr(policy)) == policy


def test_further_kinds_need_no_new_format():
    policy = Policy([2], [64], experts=[5])
    assert policy["experts"] == (5,) and Policy.from_json(policy.to_json()) == policy
    assert policy != Policy([2], [64]) and len({policy, Policy([2], [64])}) == 2
    assert Policy.from_json(written(attention=[1], ffn=[2], self=[3]))["self"] == (3,)


def test_immutable():
    policy = Policy([2], [64])
    with pytest.raises(AttributeError):
        policy.ffn = (3,)
    with pytest.raises(TypeError):
        policy["ffn"] = (3,)
    given = [2, 1]
    policy = Policy(given, [64, 64])
    given[0] = 3
    assert policy.attention == (2, 1)


@pytest.mark.parametrize(
    ("policy", "uniform"),
    [(Policy([2, 2], [8, 8]), True), (Policy([2, 1], [8, 8]), False), (Policy([2, 2], [8, 0]), False)],
)
def test_is_uniform(policy, uniform):
    assert policy.is_uniform is uniform


def test_integers_of_other_libraries_are_taken_and_fractions_are_not():
    assert Policy(np.array([1, 2]), torch.tensor([3, 4])) == Policy([1, 2], [3, 4])
    assert all(type(width) is int for width in Policy(np.array([1, 2]), torch.tensor([3, 4])).attention)
    for odd in (512 / 3, 170.0, "2", None):  # of the first a peer makes 170
        with pytest.raises(TypeError):
            Policy([odd], [1])


@pytest.mark.parametrize(
    "text", ['{"attention": [3, 2], "ffn": [64, 0]}', '{"attention": [3], "ffn": [64], "ratio": 0.25}']
)
def test_files_of_format_1_are_refused_by_name(text):
    with pytest.raises(InputError) as caught:
        Policy.from_json(text)
    message = str(caught.value)
    assert caught.value.field == "policy" and "older PPF" in message and '"format": 2' in caught.value.remedy
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("", "policy"),
        ("{", "policy"),
        ("[" * 100_000, "policy"),
        ("[1, 2]", "policy.format"),
        ("3", "policy.format"),
        ("null", "policy.format"),
        ('{"attention": [1]}', "policy.format"),
        ('{"format": 3, "widths": {"attention": [1], "ffn": [1]}}', "policy.format"),
        ('{"format": "2", "widths": {"attention": [1], "ffn": [1]}}', "policy.format"),
        ('{"format": 2}', "policy.widths"),
        ('{"format": 2, "widths": [[1], [1]]}', "policy.widths"),
        (written(attention=[1]), "policy.widths"),
        (written(attention=[1], ffn=3), "policy.widths.ffn"),
        (written(attention=[1], ffn=[1.5]), "policy.widths.ffn"),
        (written(attention=[True], ffn=[1]), "policy.widths.attention"),
        (written(attention=["1"], ffn=[1]), "policy.widths.attention"),
        (written(attention=[1], ffn=[None]), "policy.widths.ffn"),
        (written(attention=None, ffn=[1]), "policy.widths.attention"),
        (written(attention=[[1]], ffn=[1]), "policy.widths.attention"),
        (written(attention="12", ffn=[1]), "policy.widths.attention"),
        (written(attention=[1], ffn=[1], experts=[0.5]), "policy.widths.experts"),
    ],
)
def test_from_json_refuses(text, field):
    with pytest.raises(InputError) as caught:
        Policy.from_json(text)
    assert caught.value.field == field and caught.value.remedy
    assert field == "policy" or '"format": 2' in caught.value.remedy


def test_half_a_character_is_refused():
    """JSON can write it, and no name holds it."""
    with pytest.raises(InputError, match="widths"):
        Policy.from_dict({"format": 2, "\ud800": 1})
