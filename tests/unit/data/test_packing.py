# SPDX-License-Identifier: Apache-2.0
"""Claim: packing loses, duplicates and misaligns nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_g2rpo.data.packing import PackSequence, response_values
from megatron_g2rpo.types import NO_LABEL
from tests.common.parity import packer_for, random_sequences
from tests.common.tiny_model import random_inputs, tiny_config


def test_every_field_is_aligned_with_the_predicting_position() -> None:
    config = tiny_config()
    sequences = random_sequences(config, samples=3)
    batches = packer_for(config).pack(sequences, budget=100)
    assert len(batches) > 1
    seen = []
    for batch in batches:
        responses = response_values(batch, batch.labels)
        for row in batch.sequence_ids.tolist():
            seen.append(row)
            sequence = sequences[row]
            assert torch.equal(responses[row], sequence.response_ids)
            where = (batch.segment_ids == batch.sequence_ids.tolist().index(row)).nonzero().squeeze(1)
            tokens = torch.cat([sequence.inputs.token_ids, sequence.response_ids])
            assert torch.equal(batch.tokens[where], tokens)
            # The response alone, and no label crosses into the next sequence: the trap of a roll over the row.
            prompt = len(sequence.inputs.token_ids)
            assert batch.labels[where][-1] == NO_LABEL
            assert torch.equal(batch.labels[where][prompt - 1 : -1], tokens[prompt:])
            assert torch.all(batch.labels[where][: prompt - 1] == NO_LABEL)
            assert batch.position_ids[:, where[0]].tolist() == [0, 0, 0]
            advantages = batch.advantages[where]
            assert int((advantages != 0).sum()) == len(sequence.response_ids)
        assert batch.num_tokens == sum(len(sequences[row].response_ids) for row in batch.sequence_ids.tolist())
    assert sorted(seen) == list(range(len(sequences)))


def with_kept(sequence: PackSequence, most: int) -> PackSequence:
    """Each token kept beside up to ``most`` others; what is not used is -1."""
    ids = sequence.response_ids[:, None] + torch.arange(most + 1)
    return replace(sequence, kept_ids=ids.masked_fill(torch.arange(most + 1) > torch.arange(len(ids))[:, None], -1))


def test_what_a_label_was_sampled_from_stands_where_it_is_predicted() -> None:
    config = tiny_config()
    plain = random_sequences(config, samples=3)
    sequences = [with_kept(sequence, index % 3) for index, sequence in enumerate(plain)]
    packer = replace(packer_for(config), sequence_multiple=4, row_multiple=8)
    batches = packer.pack(sequences, budget=120, num_bins=9)
    widths = set()
    for batch in batches[:-1]:
        if batch.kept_ids is None:
            assert not len(batch.sequence_ids), "a row of padding has no label"
            continue
        widths.add(len(batch.kept_ids))
        for row, kept in response_values(batch, batch.kept_ids.t()).items():
            assert torch.equal(kept[:, : sequences[row].kept_ids.shape[1]], sequences[row].kept_ids)
            assert (kept[:, sequences[row].kept_ids.shape[1] :] == -1).all()
        assert (batch.kept_ids[:, batch.labels == NO_LABEL] == -1).all()
        assert (batch.kept_ids == batch.labels).any(0)[batch.labels != NO_LABEL].all()
    assert widths
    assert all(batch.kept_ids is None for batch in packer.pack(plain, budget=120))
    with pytest.raises(ValueError, match=r"of 2 sequences, 1 say what their tokens were sampled from"):
        packer.pack([plain[0], sequences[1]], budget=1000)


def test_samples_of_a_group_share_one_copy_of_their_images() -> None:
    config = tiny_config()
    inputs = random_inputs(config, grids=[((4, 6),)])[0]
    sequences = [PackSequence(inputs=inputs, response_ids=torch.tensor([1, 2])) for _ in range(5)]
    (batch,) = packer_for(config).pack(sequences, budget=500)
    assert torch.equal(batch.pixel_values, inputs.pixel_values)
    placeholders = batch.tokens == config.image_token_id
    assert torch.equal(batch.vision_index[placeholders], torch.arange(6).repeat(5))
    assert torch.all(batch.vision_index[~placeholders] == -1)


def test_a_sequence_kept_out_of_the_loss_counts_no_token() -> None:
    config = tiny_config()
    kept, left = (replace(sequence, token_weight=1.0) for sequence in random_sequences(config, samples=1)[:2])
    left = PackSequence(inputs=left.inputs, response_ids=left.response_ids, advantage=1.0, in_loss=False)
    (batch,) = packer_for(config).pack([kept, left], budget=500)
    assert batch.num_tokens == len(kept.response_ids)
    assert batch.token_weights.sum() == batch.num_tokens


def test_empty_rows_fill_up_to_the_number_of_the_other_ranks() -> None:
    config = tiny_config()
    batches = packer_for(config).pack(random_sequences(config, samples=1)[:1], budget=100, num_bins=3)
    assert [batch.num_tokens for batch in batches] == [1, 0, 0]
    with pytest.raises(ValueError, match="more than the 1 asked for"):
        packer_for(config).pack(random_sequences(config, samples=2), budget=40, num_bins=1)


@pytest.mark.parametrize(("sequence", "row"), [(1, 16), (4, 4), (4, 24), (8, 128)])
def test_padding_follows_its_sequence_and_says_nothing(sequence: int, row: int) -> None:
    config = tiny_config()
    packer = replace(packer_for(config), sequence_multiple=sequence, row_multiple=row)
    sequences = random_sequences(config, samples=3)
    plain = {
        row: batch for batch in packer_for(config).pack(sequences, budget=100) for row in batch.sequence_ids.tolist()
    }
    seen = []
    for batch in packer.pack(sequences, budget=128, num_bins=12):
        assert len(batch.tokens) % row == 0
        assert torch.all(batch.cu_seqlens_padded % sequence == 0)
        assert int(batch.cu_seqlens_padded[-1]) == len(batch.tokens)
        padding = batch.segment_ids == -1
        for name, value in (("labels", NO_LABEL), ("loss_mask", 0), ("token_weights", 0), ("advantages", 0)):
            assert torch.all(getattr(batch, name)[padding] == value), name
        assert torch.all(batch.tokens[padding] == packer.pad_token_id)
        assert torch.all(batch.task_ids[padding] == -1)
        assert torch.all(batch.vision_index[padding] == -1)
        for segment, index in enumerate(batch.sequence_ids.tolist()):
            seen.append(index)
            start, length = int(batch.cu_seqlens_padded[segment]), int(batch.cu_seqlens.diff()[segment])
            real = slice(start, start + length)
            other = plain[index]
            where = other.segment_ids == other.sequence_ids.tolist().index(index)
            for name in ("tokens", "labels", "position_ids", "loss_mask", "advantages", "task_ids", "token_weights"):
                assert torch.equal(getattr(batch, name)[..., real], getattr(other, name)[..., where]), name
    assert sorted(seen) == list(range(len(sequences)))


def test_multiples_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="row_multiple 6 is not a multiple of 4"):
        replace(packer_for(tiny_config()), sequence_multiple=4, row_multiple=6)
