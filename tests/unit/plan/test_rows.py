# SPDX-License-Identifier: Apache-2.0
"""Claim: rows, micro-batches and attention slots of a plan are what the packer and the core attention make."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_g2rpo.data.packing import Packer, PackSequence
from megatron_g2rpo.plan.activations import Recompute
from megatron_g2rpo.plan.rows import Row, assume, micro_batches
from megatron_g2rpo.plan.sizes import Modules, sizes
from megatron_g2rpo.plan.slots import bucket_slots, span_slots
from megatron_g2rpo.policy.layouts.layout import Layout, layout_of
from megatron_g2rpo.policy.packed_row import packed_row_params
from megatron_g2rpo.types import ModelInputs, PackedBatch
from tests.common.tiny_model import make_tiny_qwen3vl, special_tokens, tiny_config
from tests.unit.plan.measured import MEGATRON, batch_of, row_of, tiny_recipe

GPU = 80e9


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("context", [1, 2, 4])
def test_attention_slots_are_those_of_the_core_attention(context: int, samples: int) -> None:
    config, layout = tiny_config(), Layout(context=context)
    for grids, text, response in ((((), (), ()), 7, 3), ((((4, 6),), ((8, 8), (2, 4)), ()), 30, 21), (((),), 1, 1)):
        batch = batch_of(config, layout, grids, text, response, samples)
        row = row_of(config, batch)
        for rank in range(context):
            buckets = packed_row_params(batch, context, rank).buckets
            slots = bucket_slots(row, context, rank)
            assert slots.tokens == sum(len(bucket.tokens) for bucket in buckets)
            assert slots.queries == sum(bucket.queries.numel() for bucket in buckets)
            assert slots.keys == sum(bucket.keys.numel() for bucket in buckets)
            assert slots.mask == sum(0 if bucket.mask is None else bucket.mask.numel() for bucket in buckets)
            spans, slots = packed_row_params(batch, context, rank, buckets=False).spans, span_slots(row, context, rank)
            assert slots.copied == (max(row.parents) >= 0)
            if spans is not None:
                assert (slots.queries, slots.keys) == (len(spans.queries), len(spans.keys))
            elif slots.copied:  # a rank of padding alone
                assert slots.queries == 0
            else:
                assert slots.queries == slots.keys == row.tokens // context


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize(("tokens", "response"), [(100, 94), (260, 60), (500, 400), (500, 3)])
def test_micro_batches_are_those_of_the_packer(
    tmp_path: Path, samples: int, tokens: int, response: int, shared: bool
) -> None:
    """Groups that fit into a row several times, once, and not at all; prompts and responses of most of a sequence."""
    config, _ = make_tiny_qwen3vl(tmp_path)
    recipe = tiny_recipe(
        tmp_path,
        "policy.max_total_sequence_length=500",
        "policy.sequence_packing.train_mb_tokens=1100",
        f"policy.sequence_packing.shared_prefix={str(shared).lower()}",
        "policy.generation.max_new_tokens=400",
        f"grpo.num_generations_per_prompt={samples}",
        "grpo.adv_estimator.stages=[task]",
        "grpo.num_prompts_per_step=48",
        f"policy.train_global_batch_size={24 * samples}",
        f"{MEGATRON}context_parallel_size=2",
        world=8,
        kind="train",
    )
    layout = layout_of(recipe.policy.megatron_cfg)
    planned = micro_batches(recipe, layout, assume(recipe, config, tokens, 6, GPU, response))
    patches = torch.zeros(24, 3 * 2 * 8 * 8)
    special = special_tokens(config.text_config.vocab_size)
    ids = torch.tensor([special.image] * 6 + [0] * (tokens - response - 6))
    sequences = []
    for _ in range(24 // 4):  # prompts of one of four data-parallel ranks
        inputs = ModelInputs(token_ids=ids, pixel_values=patches, image_grid_thw=torch.tensor([[1, 4, 6]]))
        answer = torch.zeros(response, dtype=torch.int64)
        sequences += [PackSequence(inputs=inputs, response_ids=answer) for _ in range(samples)]
    packer = Packer(
        image_token_id=special.image,
        spatial_merge_size=2,
        pad_token_id=special.pad,
        sequence_multiple=4,
        row_multiple=4,
        shared_prefix=shared,
    )
    rows = packer.pack(sequences, budget=1100)
    assert planned.sequences == len(sequences)
    assert planned.count == len(rows)
    assert planned.tokens == sum(len(row.tokens) for row in rows)
    assert planned.computed == sum(int((row.segment_ids >= 0).sum()) for row in rows)
    assert planned.pairs == pytest.approx(sum(pairs_of(row) for row in rows))
    assert planned.images == sum(len(row.image_grid_thw) for row in rows)
    assert len(planned.row.images) == max(len(row.image_grid_thw) for row in rows)
    assert planned.row.tokens == 1100
    assert planned.together == max(
        [1, *(row.parents.tolist().count(parent) for row in rows for parent in set(row.parents.tolist()) - {-1})]
    )


def pairs_of(row: PackedBatch) -> float:
    """Pairs of a query and a key of a packed row, the diagonal counted half."""
    lengths = row.cu_seqlens.diff().tolist()
    return sum(
        length * length / 2 + (length * lengths[parent] if parent >= 0 else 0)
        for length, parent in zip(lengths, row.parents.tolist(), strict=True)
    )


@pytest.mark.parametrize(("tokens", "response"), [(200, 100), (400, 100), (1000, 600), (1000, 300)])
def test_the_row_that_memory_is_planned_for_is_full_and_its_branches_follow_a_trunk(
    tmp_path: Path, tokens: int, response: int
) -> None:
    """Of a group that no row holds, the trunk and all of its responses, shorter ones: these look up the most keys."""
    config, _ = make_tiny_qwen3vl(tmp_path)
    recipe = tiny_recipe(
        tmp_path,
        "policy.max_total_sequence_length=1000",
        "policy.generation.max_new_tokens=600",
        "policy.sequence_packing.train_mb_tokens=1000",
        "grpo.num_generations_per_prompt=8",
        "policy.train_global_batch_size=64",
        kind="train",
    )
    row = micro_batches(recipe, Layout(), assume(recipe, config, tokens, 6, GPU, response)).row
    assert row.tokens == 1000
    assert all(row.parents[parent] == -1 and parent < index for index, parent in enumerate(row.parents) if parent >= 0)
    trunks = set(row.parents) - {-1}
    assert trunks
    assert all(row.lengths[trunk] == tokens - response - 1 for trunk in trunks)
    assert max(row.parents.count(trunk) for trunk in trunks) == 8
    assert all(length <= padded for length, padded in zip(row.lengths, row.padded, strict=True))
    assert row.labels == sum(n for n, parent in zip(row.lengths, row.parents, strict=True) if parent >= 0)


def test_assumptions_are_the_worst_case_and_stay_within_the_recipe(tmp_path: Path) -> None:
    config, _ = make_tiny_qwen3vl(tmp_path)
    base = ["policy.max_total_sequence_length=1024", "policy.generation.max_new_tokens=512"]
    recipe = tiny_recipe(tmp_path, *base)
    assert vars(assume(recipe, config, None, None, GPU)) == {
        "sequence_tokens": 1024,
        "image_tokens": 512,
        "response_tokens": 512,
        "gpu_memory": GPU,
    }
    # A merged token is 16 x 16 pixels here.
    small = tiny_recipe(tmp_path, *base, "data.max_pixels=25600")
    assert assume(small, config, None, None, GPU).image_tokens == 100
    assert assume(small, config, 64, None, GPU).image_tokens == 64
    assert assume(small, config, None, 0, GPU).image_tokens == 0
    with pytest.raises(ValueError, match="--mean-tokens 1025"):
        assume(recipe, config, 1025, None, GPU)
    with pytest.raises(ValueError, match="--image-tokens 513"):
        assume(recipe, config, None, 513, GPU)


@pytest.mark.parametrize(("vocab", "tensor", "columns"), [(160, 1, 160), (161, 2, 81), (3, 4, 1)])
def test_columns_are_those_of_the_rank_with_the_most(vocab: int, tensor: int, columns: int) -> None:
    text = tiny_config(vocab=max(vocab, 6)).text_config
    text.vocab_size = vocab
    assert sizes(text, Layout(tensor=tensor), 8, 4, Modules()).columns == columns


@pytest.mark.parametrize(
    ("recompute", "layers", "chunks", "whole"),
    [
        (Recompute(None, "uniform", 1), 5, [], 5),
        (Recompute("selective", "uniform", 1), 5, [], 5),
        (Recompute("full", "uniform", 2), 6, [2, 2, 2], 0),
        (Recompute("full", "block", 2), 6, [1, 1], 4),
        (Recompute("full", "block", 9), 6, [1] * 6, 0),
    ],
)
def test_chunks_of_layers(recompute: Recompute, layers: int, chunks: list[int], whole: int) -> None:
    assert recompute.chunks(layers) == (chunks, whole)


def test_a_row_counts_its_padding() -> None:
    assert Row(lengths=(3, 5), padded=(4, 8), parents=(-1, 0), images=(), placeholders=0, labels=2).tokens == 12
