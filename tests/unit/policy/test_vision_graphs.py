# SPDX-License-Identifier: Apache-2.0
"""Claim: an update that learns through generation's forward pass of the tower computes what transformers computes.

Then that the tower runs once, that no graph outlives its weights, and that a gradient which is counted twice or never
is detected. The engine's part in it: ``tests/unit/train/test_shared_features.py``; several ranks:
``tests/parallel/test_vision_graphs.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_g2rpo.data.packing import PackSequence
from megatron_g2rpo.models import vision_graphs
from megatron_g2rpo.models.images import Image, images_of
from megatron_g2rpo.models.vision_cache import VisionCache
from megatron_g2rpo.models.vision_graphs import VisionGraphs
from megatron_g2rpo.policy.device import select
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.types import PackedBatch
from tests.common.compare import largest_distance
from tests.common.parity import packer_for, random_sequences, toy_loss
from tests.common.policy_layout import layout_options
from tests.common.tiny_model import tiny_config
from tests.common.traps import SHAPE, Baseline, measure
from tests.common.vision_graphs import generate

MEGABYTE = 10**6
# float32 sums in another order.
TOLERANCE = 1e-5


def group_sequences() -> list[PackSequence]:
    """Groups of three answers: two prompts about one image, one about two, one about none."""
    config: Any = tiny_config(vocab=SHAPE["vocab"])
    sequences = random_sequences(config, samples=3, grids=(((4, 6),), ((4, 6),), ((2, 4), (6, 4)), ()))
    twin = sequences[0].inputs.pixel_values
    return [
        replace(each, inputs=replace(each.inputs, pixel_values=twin.clone())) if 3 <= number < 6 else each
        for number, each in enumerate(sequences)
    ]


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Baseline:
    return Baseline.make(tmp_path_factory.mktemp("model"), group_sequences())


class Watched:
    """A policy that keeps graphs up to a bound, and the patches of each forward and backward pass of its tower."""

    def __init__(self, directory: Path, max_bytes: int = 1000 * MEGABYTE, **options: Any) -> None:
        self.graphs = VisionGraphs(max_bytes)
        self.cache = VisionCache(MEGABYTE, frozen=False, graphs=self.graphs if max_bytes else None)
        settings = layout_options(directory, **{"lr": 1e-2, **options})
        self.policy = MegatronPolicy(settings, select("cpu"), seed=0, max_steps=10, vision_cache=self.cache)
        self.forward: list[int] = []
        self.backward: list[int] = []
        tower: Any = self.policy.model.vision_model
        tower.blocks[0].register_forward_pre_hook(lambda _, args: self.forward.append(len(args[0])))
        tower.blocks[0].register_full_backward_hook(lambda _, given, got: self.backward.append(len(got[0])))

    def generate(self, rows: Sequence[PackedBatch]) -> list[Tensor]:
        return generate(self.policy, rows)

    def rows(self, baseline: Baseline, budget: int, *, shared: bool) -> list[PackedBatch]:
        return packer_for(self.policy.hf_config, shared_prefix=shared).pack(baseline.sequences, budget)

    def gradients(self, rows: list[PackedBatch]) -> dict[str, Tensor]:
        self.policy.gradients(rows, toy_loss)
        return {name: tensor.clone() for name, tensor in self.policy.stream(lambda parameter: parameter.main_grad)}


def distinct_images(rows: Sequence[PackedBatch]) -> dict[str, Image]:
    return {image.name: image for row in rows for image in images_of(row.pixel_values, row.image_grid_thw)}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("budget", "shared"), [(1000, True), (60, True), (60, False)])
def test_values_and_gradients_are_those_of_transformers(
    baseline: Baseline, budget: int, shared: bool, recompute: bool
) -> None:
    """In one row; with groups, and images, in several rows; and without sharing. Twice: graphs serve each task too."""
    options = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    watched = Watched(baseline.directory, **(options if recompute else {}))
    rows = watched.rows(baseline, budget, shared=shared)
    assert (len(rows) > 1) == (budget == 60)
    watched.generate(rows)
    encoded = list(watched.forward)
    assert sum(encoded) == sum(image.num_patches for image in distinct_images(rows).values())
    for _ in range(2):
        measure(watched.policy, baseline, rows).assert_within_tolerance()
    assert len(watched.backward) == 2 * len(encoded), "once a pass and gradient"
    if not recompute:
        assert watched.forward == encoded, "neither log-probabilities nor gradients ran the tower"


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_images_beyond_the_bound_are_encoded_by_the_update(
    baseline: Baseline, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    monkeypatch.setattr(vision_graphs, "_PATCHES_TOGETHER", 1)
    watched = Watched(baseline.directory)
    rows = watched.rows(baseline, 60, shared=True)
    encoder: Any = watched.policy.model._encode_images
    sizes = [image.num_patches for image in distinct_images(rows).values()]
    bound = sum(encoder.graph_bytes(size) for size in sizes[:kept])
    watched.graphs._max_bytes = bound
    watched.generate(rows)
    assert watched.graphs.num_bytes == bound
    watched.forward.clear()
    measure(watched.policy, baseline, rows).assert_within_tolerance()
    assert sum(watched.forward) >= sum(sizes[kept:]), "of what was not kept"


def test_a_step_leaves_the_weights_of_one_without_kept_graphs(baseline: Baseline) -> None:
    kept, plain = Watched(baseline.directory), Watched(baseline.directory, 0)
    for watched in (kept, plain):
        for _ in range(2):
            rows = watched.rows(baseline, 60, shared=True)
            watched.generate(rows)
            watched.policy.update(rows, toy_loss)
            assert watched.graphs.num_bytes == 0
    images = sum(image.num_patches for image in distinct_images(rows).values())
    assert sum(kept.forward) == sum(kept.backward) == 2 * images
    assert sum(plain.forward) > sum(kept.forward)
    work = kept.policy.model.vision_work
    assert (work.encoded, work.learnt) == (0, 2 * images), "generation counts the forward pass"
    # Adam divides a gradient by its own size: where that is nothing but rounding, so is the step.
    assert largest_distance(dict(kept.policy.stream()), dict(plain.policy.stream())) <= 1e-4


def test_nothing_is_kept_outside_of_a_step_or_after_its_first_update(baseline: Baseline) -> None:
    watched = Watched(baseline.directory)
    rows = watched.rows(baseline, 60, shared=True)
    generate(watched.policy, rows, begins=False)
    assert watched.graphs.num_bytes == 0, "a validation"
    watched.generate(rows)
    assert watched.graphs.num_bytes > 0
    watched.policy.update(rows, toy_loss, skips=lambda loss, norm: True)
    assert watched.graphs.num_bytes == 0, "a skipped update"
    watched.forward.clear()
    watched.policy.gradients(rows, toy_loss)
    assert watched.forward, "the second update runs the tower"


def test_a_graph_of_former_weights_is_never_used(baseline: Baseline) -> None:
    kept, plain = Watched(baseline.directory), Watched(baseline.directory, 0)
    rows = kept.rows(baseline, 60, shared=True)
    kept.generate(rows)
    for watched in (kept, plain):
        with torch.no_grad():
            for weight in watched.policy.local_weights():
                weight.mul_(1.1)
        watched.policy.weights_written()
    assert largest_distance(kept.gradients(rows), plain.gradients(rows)) <= TOLERANCE


def test_a_graph_that_outlives_its_weights_would_be_noticed(
    baseline: Baseline, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, plain = Watched(baseline.directory), Watched(baseline.directory, 0)
    rows = kept.rows(baseline, 60, shared=True)
    kept.generate(rows)
    monkeypatch.setattr(VisionGraphs, "drop", lambda self: None)
    for watched in (kept, plain):
        for weight in watched.policy.local_weights():
            weight.data.mul_(1.1)  # as the optimizer's copies do: autograd's own check does not see it
        watched.policy.weights_written()
    assert largest_distance(kept.gradients(rows), plain.gradients(rows)) > 100 * TOLERANCE


def test_a_gradient_that_never_reaches_the_tower_is_an_error(
    baseline: Baseline, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(baseline.directory)
    rows = watched.rows(baseline, 60, shared=True)
    watched.generate(rows)
    monkeypatch.setattr(VisionGraphs, "backward", lambda self: [])
    assert not measure(watched.policy, baseline, rows).worst["gradient"][0] <= 100 * TOLERANCE
    with pytest.raises(RuntimeError, match="never went through the tower"):
        watched.policy.update(rows, toy_loss)


def test_a_gradient_that_is_taken_again_counts_once(baseline: Baseline) -> None:
    watched = Watched(baseline.directory)
    rows = watched.rows(baseline, 60, shared=True)
    watched.generate(rows)
    watched.policy.config.finalize_model_grads_func.args[0]()  # type: ignore[union-attr]
    measure(watched.policy, baseline, rows).assert_within_tolerance()
    before = watched.gradients(rows)
    watched.policy.model.finish_vision_backward()
    after = {name: tensor.clone() for name, tensor in watched.policy.stream(lambda parameter: parameter.main_grad)}
    assert largest_distance(after, before) == 0.0


def test_a_gradient_that_is_counted_twice_would_be_noticed(baseline: Baseline, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(baseline.directory)
    rows = watched.rows(baseline, 60, shared=True)
    watched.generate(rows)
    monkeypatch.setattr(VisionGraphs, "_forget_gradients", lambda self: None)  # those of one pass join the next one's
    measure(watched.policy, baseline, rows).assert_within_tolerance()
    assert measure(watched.policy, baseline, rows).worst["gradient"][0] > 100 * TOLERANCE


def test_a_layout_that_cannot_keep_graphs_is_refused(baseline: Baseline) -> None:
    with pytest.raises(ValueError, match="rows to itself"):
        Watched(baseline.directory, mode="overlap")
