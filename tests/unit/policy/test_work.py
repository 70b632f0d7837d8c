# SPDX-License-Identifier: Apache-2.0
"""Claims: what is counted of a pass is what it computed, by torch's own count, and what sharing prompts saves of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_g2rpo.data.packing import Packer, PackSequence
from megatron_g2rpo.models import flops
from megatron_g2rpo.models.vision_cache import VisionCache
from megatron_g2rpo.policy.device import select
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.policy.work import RowWork, Work, row_work
from megatron_g2rpo.train.step.work import WorkMeter, work_metrics
from tests.common.parity import packer_for, random_sequences, toy_loss
from tests.common.policy_layout import layout_options
from tests.common.tiny_model import make_tiny_qwen3vl


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_tiny_qwen3vl(directory)
    return directory


def policy_of(directory: Path, *, frozen: bool = False, cached: bool = False) -> MegatronPolicy:
    cache = VisionCache(10**6, frozen=frozen) if cached else None
    options = layout_options(directory, freeze_vision=frozen)
    return MegatronPolicy(options, select("cpu"), seed=0, max_steps=5, vision_cache=cache)


def sequences_of(policy: MegatronPolicy, *, samples: int = 3) -> list[PackSequence]:
    return random_sequences(policy.hf_config, samples=samples)


def packer(policy: MegatronPolicy, *, shared: bool, multiple: int = 1) -> Packer:
    return replace(
        packer_for(policy.hf_config), shared_prefix=shared, sequence_multiple=multiple, row_multiple=multiple
    )


@pytest.mark.parametrize("multiple", [1, 4])
def test_sharing_saves_the_prompts_that_are_there_once(directory: Path, multiple: int) -> None:
    policy = policy_of(directory)
    sequences = sequences_of(policy)
    unshared = sum(sequence.length for sequence in sequences)
    alone, shared = (
        sum(map(row_work, packer(policy, shared=on, multiple=multiple).pack(sequences, budget=1000)), RowWork())
        for on in (False, True)
    )
    assert (alone.tokens, alone.saved) == (unshared, 0)
    assert alone.pairs == sum(sequence.length**2 / 2 for sequence in sequences)
    assert shared.tokens + shared.saved == unshared
    # A trunk is a prompt without its last token; a branch is that token and the response without its last.
    once = {id(sequence.inputs): len(sequence.inputs.token_ids) - 1 for sequence in sequences}
    assert shared.tokens == sum(once.values()) + sum(len(sequence.response_ids) for sequence in sequences)
    responses = sum(len(sequence.response_ids) for sequence in sequences)
    assert alone.labels == shared.labels == responses
    assert shared.pairs < alone.pairs
    assert (alone.padding + shared.padding > 0) == (multiple > 1)


def test_a_row_of_padding_computes_nothing_that_counts(directory: Path) -> None:
    policy = policy_of(directory)
    row = packer(policy, shared=True, multiple=8).pack([], budget=64, num_bins=1)[0]
    assert row_work(row) == RowWork(padding=8)


@pytest.mark.parametrize("shared", [False, True])
def test_products_are_those_that_torch_counts(directory: Path, shared: bool) -> None:
    policy = policy_of(directory)
    text = [sequence for sequence in sequences_of(policy) if not len(sequence.inputs.image_grid_thw)]
    rows = packer(policy, shared=shared).pack(text, budget=1000)
    expected = _products(policy, rows)
    with FlopCounterMode(display=False) as counter:
        policy.logprobs(rows)
    assert _mm(counter) == expected, "linears and logits, to the last one"

    with_images = packer(policy, shared=shared).pack(sequences_of(policy), budget=1000)
    before = policy.model.vision_work.encoded
    with FlopCounterMode(display=False) as counter:
        policy.logprobs(with_images)
    patches = policy.model.vision_work.encoded - before
    tower = flops.vision(flops.shape_of(policy.hf_config), patches=patches, pairs=0)
    assert tower > 0.1 * expected
    assert _mm(counter) - _products(policy, with_images) == tower


def _products(policy: MegatronPolicy, rows: list[Any]) -> float:
    work = sum(map(row_work, rows), RowWork())
    counted = flops.forward(
        flops.shape_of(policy.hf_config), tokens=work.tokens, pairs=0, labels=work.labels, images=0, image_tokens=0
    )
    return counted.total


def _mm(counter: FlopCounterMode) -> float:
    products = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution)
    counts = counter.get_flop_counts()["Global"]
    return float(sum(count for op, count in counts.items() if op in products))


def test_a_step_counts_its_passes_and_what_the_cache_saved(directory: Path) -> None:
    policy = policy_of(directory, frozen=True, cached=True)
    sequences = sequences_of(policy)
    rows = packer(policy, shared=True).pack(sequences, budget=1000)
    policy.logprobs(rows)  # before the step: not its work
    meter = WorkMeter(policy)
    policy.logprobs(rows)
    policy.update(rows, toy_loss)
    tokens = sum(sequence.length for sequence in sequences)
    metrics = work_metrics(meter, policy, {"update": 2.0, "generation": 2.0}, tokens)
    of_rows = sum(map(row_work, rows), RowWork())
    assert metrics["work/tokens"] == 2 * of_rows.tokens
    assert metrics["work/logprob_tokens"] == of_rows.tokens
    assert metrics["work/tokens_saved"] == 2 * of_rows.saved
    assert metrics["work/logit_tokens"] == 2 * of_rows.labels
    assert metrics["work/vision_patches"] == 0
    patches = sum(len(row.pixel_values) for row in rows)
    assert metrics["work/vision_patches_saved"] == 2 * patches
    assert metrics["speed/tokens_per_second"] == tokens / 4.0
    shape = flops.shape_of(policy.hf_config)
    once = flops.forward(
        shape, tokens=of_rows.tokens, pairs=of_rows.pairs, labels=of_rows.labels, images=0, image_tokens=0
    )
    assert metrics["speed/model_tflops_per_second"] == pytest.approx(4 * once.total / 2.0 / 1e12, rel=1e-12)


def test_a_tower_that_learns_counts_its_backward_pass(directory: Path) -> None:
    policy = policy_of(directory)
    rows = packer(policy, shared=True).pack(sequences_of(policy), budget=1000)
    meter = WorkMeter(policy)
    policy.gradients(rows, toy_loss)
    work = meter.work()
    patches = sum(len(row.pixel_values) for row in rows)
    assert (work.vision.encoded, work.vision.learnt) == (patches, patches)
    assert work.vision.encoded_pairs == sum(int(n) ** 2 for row in rows for n in row.image_grid_thw.prod(dim=1))
    shape = flops.shape_of(policy.hf_config)
    rows_alone = replace(work, vision=replace(work.vision, encoded=0, encoded_pairs=0, learnt=0, learnt_pairs=0))
    tower = flops.vision(shape, patches=patches, pairs=work.vision.encoded_pairs)
    assert work.model_flops(shape) - rows_alone.model_flops(shape) == pytest.approx(3 * tower, rel=1e-12)
    assert policy.work == Work(forward=RowWork(), trained=work.trained)
