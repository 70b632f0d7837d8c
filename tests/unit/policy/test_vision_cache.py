# SPDX-License-Identifier: Apache-2.0
"""Claims: with a cache the policy computes what it computes without one, and encodes an image once while it may."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from megatron_g2rpo.data.packing import PackSequence
from megatron_g2rpo.models.vision_cache import VisionCache
from megatron_g2rpo.policy.device import select
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.policy.reference_policy import ReferencePolicy
from megatron_g2rpo.types import PackedBatch
from tests.common.compare import largest_distance
from tests.common.parity import packer_for, random_sequences, toy_loss
from tests.common.policy_layout import layout_options
from tests.common.tiny_model import make_tiny_qwen3vl

# float32 sums in another order: images that are encoded one by one, or read from where they were encoded with others.
TOLERANCE = 1e-6
MEGABYTE = 10**6


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_tiny_qwen3vl(directory)
    return directory


class Watched:
    """A policy, with the patches of each forward pass of its tower."""

    def __init__(self, directory: Path, cache: VisionCache | None, *, frozen: bool = False) -> None:
        options = layout_options(directory, freeze_vision=frozen, lr=1e-2)
        self.policy = MegatronPolicy(options, select("cpu"), seed=0, max_steps=10, vision_cache=cache)
        self.passes: list[int] = []
        tower: Any = self.policy.model.vision_model
        tower.blocks[0].register_forward_pre_hook(lambda _, args: self.passes.append(len(args[0])))

    def rows(self, sequences: list[PackSequence] | None = None, budget: int = 60) -> list[PackedBatch]:
        sequences = random_sequences(self.policy.hf_config) if sequences is None else sequences
        return packer_for(self.policy.hf_config).pack(sequences, budget=budget)

    def logprobs(self, rows: list[PackedBatch]) -> list[Tensor]:
        return [stats.logprobs for stats in self.policy.logprobs(rows)]

    def gradients(self, rows: list[PackedBatch]) -> dict[str, Tensor]:
        self.policy.gradients(rows, toy_loss)
        return {name: tensor.clone() for name, tensor in self.policy.stream(lambda parameter: parameter.main_grad)}


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def test_a_frozen_tower_is_run_once_over_two_steps(directory: Path) -> None:
    cached = Watched(directory, VisionCache(MEGABYTE, frozen=True), frozen=True)
    plain = Watched(directory, None, frozen=True)
    for _ in range(2):
        for watched in (cached, plain):
            rows = watched.rows()
            watched.policy.logprobs(rows)
            watched.policy.update(rows, toy_loss)
    distinct = {id(row.inputs): len(row.inputs.pixel_values) for row in random_sequences(cached.policy.hf_config)}
    assert sum(cached.passes) == sum(distinct.values())
    assert sum(plain.passes) >= 4 * sum(distinct.values())
    work = cached.policy.model.vision_work
    assert (work.encoded, work.learnt) == (sum(distinct.values()), 0)
    assert work.known == sum(plain.passes) - sum(distinct.values())
    weights = [dict(watched.policy.stream()) for watched in (cached, plain)]
    # Adam divides a gradient by its own size: where that is nothing but rounding, so is the step.
    assert largest_distance(*weights) <= 1e-4
    assert distance(cached.logprobs(rows), plain.logprobs(rows)) <= 1e-3


def test_passes_without_gradient_read_what_is_known_and_updates_do_not(directory: Path) -> None:
    cached, plain = Watched(directory, VisionCache(MEGABYTE, frozen=False)), Watched(directory, None)
    rows = cached.rows()
    expected, first = plain.logprobs(rows), cached.logprobs(rows)
    once = list(cached.passes)
    assert distance(first, expected) == distance(cached.logprobs(rows), expected) == 0.0
    assert cached.passes == once, "the second pass needs no tower"
    with_images = sum(bool(len(row.image_grid_thw)) for row in rows)
    gradients = cached.gradients(rows)
    assert largest_distance(gradients, plain.gradients(rows)) == 0.0
    assert len(cached.passes) - len(once) == with_images > 1
    assert any("visual" in name and float(gradient.abs().max()) > 0 for name, gradient in gradients.items())


def test_features_are_computed_anew_once_the_tower_has_moved(directory: Path) -> None:
    cached, plain = Watched(directory, VisionCache(MEGABYTE, frozen=False)), Watched(directory, None)
    rows = cached.rows()
    before = cached.logprobs(rows)
    for watched in (cached, plain):
        watched.policy.update(rows, toy_loss)
    after = cached.logprobs(rows)
    assert distance(after, plain.logprobs(rows)) == 0.0
    assert distance(after, before) > 1e-3


def test_a_skipped_update_leaves_what_is_known(directory: Path) -> None:
    cached = Watched(directory, VisionCache(MEGABYTE, frozen=False))
    rows = cached.rows()
    cached.policy.logprobs(rows)
    cached.policy.update(rows, toy_loss, skips=lambda loss, norm: True)
    cached.passes.clear()
    cached.policy.logprobs(rows)
    assert cached.passes == []


@pytest.mark.parametrize("frozen", [False, True])
def test_the_reference_policy_has_features_of_its_own_tower(directory: Path, frozen: bool) -> None:
    cached = Watched(directory, VisionCache(MEGABYTE, frozen=frozen), frozen=frozen)
    plain = Watched(directory, None, frozen=frozen)
    rows, theirs, ours = cached.rows(), [], []
    for watched, found in ((cached, ours), (plain, theirs)):
        reference = ReferencePolicy(watched.policy)
        watched.policy.update(rows, toy_loss)
        found += watched.logprobs(rows)
        found += [stats.logprobs for stats in reference.logprobs(rows)]
        found += watched.logprobs(rows)
    assert distance(ours, theirs) <= (TOLERANCE if not frozen else 1e-3)
    count = len(rows)
    assert distance(ours[:count], ours[count : 2 * count]) > 1e-3, "the reference policy is another"


def test_features_that_are_not_forgotten_would_be_noticed(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached, plain = Watched(directory, VisionCache(MEGABYTE, frozen=False)), Watched(directory, None)
    rows = cached.rows()
    cached.policy.logprobs(rows)
    monkeypatch.setattr(VisionCache, "weights_changed", lambda self: None)
    for watched in (cached, plain):
        watched.policy.update(rows, toy_loss)
    assert distance(cached.logprobs(rows), plain.logprobs(rows)) > 100 * TOLERANCE


def shared_picture(config: Any) -> list[PackSequence]:
    """Two prompts with other text about the same image, each with a copy of its patches, and one about another."""
    first, *_, other = random_sequences(config, samples=1, grids=(((4, 6),), ((4, 6),), ((4, 6),)))
    ids = first.inputs.token_ids.clone()
    ids[:5] = ids[:5].flip(0)
    inputs = replace(first.inputs, token_ids=ids, pixel_values=first.inputs.pixel_values.clone())
    return [first, other, replace(first, inputs=inputs)]


def test_an_image_that_prompts_share_is_encoded_once_a_row_with_the_whole_gradient(directory: Path) -> None:
    cached, plain = Watched(directory, VisionCache(MEGABYTE, frozen=False)), Watched(directory, None)
    (row,) = cached.rows(shared_picture(cached.policy.hf_config), budget=1000)
    assert len(row.image_grid_thw) == 3
    ours, theirs = cached.gradients([row]), plain.gradients([row])
    assert (cached.passes, plain.passes) == ([48], [72])
    assert cached.policy.model.vision_work.repeated == 24
    assert largest_distance(ours, theirs) <= 1e-5, "the image's gradient is that of both prompts"
    alone = cached.gradients(cached.rows(shared_picture(cached.policy.hf_config)[1:], budget=1000))
    assert largest_distance(alone, theirs) > 1e-2
    assert distance(cached.logprobs([row]), plain.logprobs([row])) <= 1e-5
