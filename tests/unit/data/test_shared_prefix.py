# SPDX-License-Identifier: Apache-2.0
"""Claim: a row in which a group shares its prompt says of every response token what a row of whole sequences says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_g2rpo.data.packing import Packer, PackSequence, response_values, with_advantages
from megatron_g2rpo.types import NO_LABEL, PackedBatch
from tests.common.parity import packer_for, random_sequences
from tests.common.tiny_model import random_inputs, tiny_config

PER_TOKEN = ("labels", "loss_mask", "task_ids", "advantages", "behaviour_logprobs", "token_weights")


def both(config: Any, **changes: int) -> tuple[Packer, Packer]:
    plain = replace(packer_for(config), **changes)
    return plain, replace(plain, shared_prefix=True)


def of_responses(batches: list[PackedBatch], name: str) -> dict[int, torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    for batch in batches:
        value = getattr(batch, name)
        for index, values in response_values(batch, value if value.dim() == 1 else value.t()).items():
            assert index not in found
            found[index] = values
    return found


@pytest.mark.parametrize(("sequence", "row"), [(1, 1), (4, 4), (4, 24), (8, 128)])
@pytest.mark.parametrize("budget", [128, 1000])
def test_every_response_token_has_the_same_fields(sequence: int, row: int, budget: int) -> None:
    config = tiny_config()
    sequences = random_sequences(config, samples=5)
    plain, shared = both(config, sequence_multiple=sequence, row_multiple=row)
    apart, together = plain.pack(sequences, budget), shared.pack(sequences, budget)
    assert any((batch.parents >= 0).any() for batch in together)
    assert all((batch.parents == -1).all() for batch in apart)
    assert sum(len(batch.tokens) for batch in together) < sum(len(batch.tokens) for batch in apart)
    for name in (*PER_TOKEN, "position_ids", "tokens"):
        ours, theirs = of_responses(together, name), of_responses(apart, name)
        assert ours.keys() == theirs.keys() == set(range(len(sequences)))
        for index in ours:
            assert torch.equal(ours[index], theirs[index]), (name, index)


def test_a_branch_with_its_trunk_is_the_sequence_without_its_last_token() -> None:
    config = tiny_config()
    sequences = random_sequences(config, samples=3)
    plain, shared = both(config, sequence_multiple=4, row_multiple=8)
    whole = {}
    for batch in plain.pack(sequences, 1000):
        for segment, index in enumerate(batch.sequence_ids.tolist()):
            where = (batch.segment_ids == segment).nonzero().squeeze(1)[:-1]
            whole[index] = {name: getattr(batch, name)[..., where] for name in ("tokens", "position_ids")}
    seen = 0
    for batch in shared.pack(sequences, 1000):
        for segment, (index, parent) in enumerate(
            zip(batch.sequence_ids.tolist(), batch.parents.tolist(), strict=True)
        ):
            if parent < 0:
                continue
            seen += 1
            assert batch.parents[parent] == -1
            assert batch.sequence_ids[parent] == -1
            assert (batch.labels[batch.segment_ids == parent] == NO_LABEL).all()
            where = torch.cat([(batch.segment_ids == each).nonzero().squeeze(1) for each in (parent, segment)])
            for name, expected in whole[index].items():
                assert torch.equal(getattr(batch, name)[..., where], expected)
    assert seen == len(sequences)


def test_a_group_has_one_copy_of_its_prompt_and_of_its_images_in_a_row() -> None:
    config = tiny_config()
    inputs = random_inputs(config, grids=[((4, 6), (2, 2))])[0]
    sequences = [PackSequence(inputs=inputs, response_ids=torch.arange(1 + n) + 1) for n in range(8)]
    (batch,) = both(config)[1].pack(sequences, budget=500)
    assert len(batch.tokens) == len(inputs.token_ids) - 1 + sum(range(1, 9))
    assert torch.equal(batch.pixel_values, inputs.pixel_values)
    assert torch.equal(batch.vision_index[batch.vision_index >= 0], torch.arange(7))
    assert torch.equal(batch.tokens[batch.vision_index >= 0], torch.full((7,), config.image_token_id))


def test_a_group_that_is_split_over_rows_has_its_prompt_in_each() -> None:
    config = tiny_config()
    inputs = random_inputs(config, grids=[((4, 6),)])[0]
    sequences = [PackSequence(inputs=inputs, response_ids=torch.arange(9)) for _ in range(13)]
    prompt = len(inputs.token_ids)
    batches = both(config)[1].pack(sequences, budget=prompt - 1 + 4 * 9)
    assert [len(batch.sequence_ids) for batch in batches] == [5, 5, 5, 1]
    assert sorted(i for b in batches for i in b.sequence_ids.tolist() if i >= 0) == list(range(13))
    assert all(torch.equal(batch.pixel_values, inputs.pixel_values) for batch in batches)
    # One alone shares nothing: it costs a token more, and needs no mask.
    assert batches[-1].parents.tolist() == [-1]


def test_a_prompt_of_one_token_is_not_shared() -> None:
    config = tiny_config()
    inputs = replace(random_inputs(config, grids=[()])[0], token_ids=torch.tensor([7]))
    (batch,) = both(config)[1].pack([PackSequence(inputs=inputs, response_ids=torch.tensor([1, 2]))] * 3, budget=50)
    assert batch.parents.tolist() == [-1, -1, -1]


def test_what_tokens_were_sampled_from_stands_where_they_are_predicted() -> None:
    config = tiny_config()
    plain = random_sequences(config, samples=3)
    sequences = [
        replace(each, kept_ids=each.response_ids[:, None] + torch.arange(1 + index % 3))
        for index, each in enumerate(plain)
    ]
    seen = 0
    for batch in both(config)[1].pack(sequences, budget=200):
        assert batch.kept_ids is not None
        for index, kept in response_values(batch, batch.kept_ids.t()).items():
            seen += 1
            width = sequences[index].kept_ids.shape[1]
            assert torch.equal(kept[:, :width], sequences[index].kept_ids)
            assert (kept[:, width:] == -1).all()
        assert (batch.kept_ids[:, batch.labels == NO_LABEL] == -1).all()
    assert seen == len(sequences)


def test_advantages_reach_the_tokens_of_their_sequence_and_no_trunk() -> None:
    config = tiny_config()
    sequences = random_sequences(config, samples=4)
    advantages = torch.arange(1.0, len(sequences) + 1)
    for batch in both(config)[1].pack(sequences, budget=300):
        batch = with_advantages(batch, advantages)
        for index, values in response_values(batch, batch.advantages).items():
            assert torch.equal(values, advantages[index].expand(len(values)))
        assert (batch.advantages[batch.labels == NO_LABEL] == 0).all()


def test_a_response_with_an_image_placeholder_is_refused() -> None:
    config = tiny_config()
    inputs = random_inputs(config, grids=[((4, 6),)])[0]
    sequences = [
        PackSequence(inputs=inputs, response_ids=ids) for ids in torch.tensor([[1, 2], [config.image_token_id, 2]])
    ]
    with pytest.raises(ValueError, match="a response has an image placeholder"):
        both(config)[1].pack(sequences, budget=500)
