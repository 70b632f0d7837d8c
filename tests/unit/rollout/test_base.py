# SPDX-License-Identifier: Apache-2.0
"""The registry of rollout engines."""

from __future__ import annotations

import pytest

from megatron_g2rpo import recipe as recipes
from megatron_g2rpo.rollout import base
from tests.common.recipes import G2RPO


def test_the_embedded_default_is_found_by_its_backend_name():
    from megatron_g2rpo.rollout.transformers.engine import TransformersEngine

    assert base.get("transformers") is TransformersEngine


def test_an_unknown_backend_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"engine 'tranformers' \(did you mean 'transformers'\?\); known: .*"):
        base.get("tranformers")


def test_a_name_can_not_be_registered_twice():
    engine = base.get("transformers")
    with pytest.raises(ValueError, match="'transformers' is registered twice"):
        base.register("transformers")(type("Another", (engine,), {}))


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": 0},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"stop_strings": ("end", "")},
        {"return_kept": True},
        {"return_kept": True, "top_k": 5, "temperature": 0.0},
    ],
    ids=str,
)
def test_a_distribution_that_can_not_be_sampled_from_is_refused(fields):
    with pytest.raises(ValueError, match=r"temperature|top_p|top_k|min_p|an empty stop string|top_k bounds it"):
        base.Sampling(**{"temperature": 1.0, **fields})


def test_training_and_validation_are_sampled_apart():
    overrides = [
        "policy.generation={temperature: 0.9, top_k: 20, top_p: 0.8, stop_strings: [stop]}",
        "policy.generation={val_temperature: 0.7, val_top_p: 0.95, val_min_p: 0.1, val_stop_strings: [end]}",
    ]
    generation = recipes.load(G2RPO, overrides, "train").policy.generation
    training = base.Sampling.of_training(generation)
    assert training == base.Sampling(temperature=0.9, top_k=20, top_p=0.8, stop_strings=("stop",), return_kept=True)
    validation = base.Sampling.of_validation(generation)
    assert validation == base.Sampling(temperature=0.7, top_p=0.95, min_p=0.1, stop_strings=("end",))
    assert validation.greedily == base.Sampling(temperature=0.0, stop_strings=("end",))
