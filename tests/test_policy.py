"""Policies: immutable, hashable, and nothing but whole numbers."""

import dataclasses

import numpy as np
import pytest
import torch

from ppf.model.policy import Policy


def test_json_round_trip_and_hash():
    policy = Policy([2, 0, 1], [64, 128, 0])
    again = Policy.from_json(policy.to_json())
    assert again == policy and hash(again) == hash(policy) and len({again, policy}) == 1
    assert policy != Policy([2, 1, 0], [64, 128, 0])


def test_immutable():
    policy = Policy([2], [64])
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.ffn = (3,)
    assert isinstance(policy.attention, tuple)


@pytest.mark.parametrize(
    ("policy", "uniform"),
    [(Policy([2, 2], [8, 8]), True), (Policy([2, 1], [8, 8]), False), (Policy([2, 2], [8, 0]), False)],
)
def test_is_uniform(policy, uniform):
    assert policy.is_uniform is uniform


def test_integers_of_other_libraries_are_taken_and_fractions_are_not():
    assert Policy(np.array([1, 2]), torch.tensor([3, 4])) == Policy([1, 2], [3, 4])
    assert all(type(width) is int for width in Policy(np.array([1, 2]), torch.tensor([3, 4])).attention)
    with pytest.raises(TypeError):
        Policy([512 / 3], [1])  # a peer makes 170 of this


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1, 2]",
        "3",
        '{"attention": [1]}',
        '{"attention": [1], "ffn": 3}',
        '{"attention": [1], "ffn": [1.5]}',
        '{"attention": [true], "ffn": [1]}',
        '{"attention": ["1"], "ffn": [1]}',
        '{"attention": [1], "ffn": [null]}',
        '{"attention": null, "ffn": [1]}',
    ],
)
def test_from_json_refuses(text):
    with pytest.raises(ValueError):
        Policy.from_json(text)
