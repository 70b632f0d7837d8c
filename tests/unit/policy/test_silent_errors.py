# SPDX-License-Identifier: Apache-2.0
"""Claim: weights and features in the wrong place, which raise no exception, would fail the parity test.

Each case makes one such error on purpose and measures what it does to the log-probabilities: far more than the parity
test's tolerance. Mistakes of packing, of the loss and of layouts are in the two ``test_traps.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from megatron_g2rpo.data.packing import response_values
from megatron_g2rpo.policy.device import select
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.policy.model import PolicyModel
from megatron_g2rpo.types import PackedBatch
from tests.common.compare import Report, largest_difference
from tests.common.parity import LOGPROB_TOLERANCE, packer_for, random_sequences, reference
from tests.common.policy_layout import policy_section
from tests.common.tiny_model import make_tiny_qwen3vl
from tests.common.traps import MARGIN

# As many key/value heads as query heads: q, k and v have one shape, and gate and up always do.
SHAPE = {"layers": 2, "heads": 4, "kv_heads": 4}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("policy")
    make_tiny_qwen3vl(directory, **SHAPE)
    return directory


def compare(
    directory: Path,
    rename: Callable[[str], str] = str,
    change: Callable[[PackedBatch], PackedBatch] = lambda batch: batch,
) -> Report:
    """Errors of log-probabilities against transformers, nats.

    Args:
        rename: the policy's weights before they are loaded.
        change: every packed row.
    """
    config, model = make_tiny_qwen3vl(**SHAPE)
    policy = MegatronPolicy(policy_section(directory), select("cpu"), seed=0, max_steps=None)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    policy.load({rename(name): tensor for name, tensor in state.items()}, source="a test")
    sequences = random_sequences(config)
    expected, _ = reference(model, sequences, temperature=1.0)
    (batch,) = packer_for(config).pack(sequences, budget=200)
    (stats,) = policy.logprobs([change(batch)])
    responses = response_values(batch, stats.logprobs)
    assert len(responses) == len(sequences)
    report = Report({"logprob": LOGPROB_TOLERANCE})
    for row, logprobs in responses.items():
        report.note("logprob", largest_difference(logprobs, expected[row]), f"sequence {row}")
    return report


def swapped(one: str, other: str) -> Callable[[str], str]:
    """Names with the two parts exchanged."""
    return lambda name: name.replace(one, "\0").replace(other, one).replace("\0", other)


def test_nothing_changed(directory: Path) -> None:
    compare(directory).assert_within_tolerance()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("q_proj", "k_proj"),
        ("k_proj", "v_proj"),
        ("gate_proj", "up_proj"),
        ("q_norm", "k_norm"),
        ("input_layernorm", "post_attention_layernorm"),
        ("layers.0.", "layers.1."),
        ("deepstack_merger_list.0.", "deepstack_merger_list.1."),
    ],
    ids=lambda name: name.strip("."),
)
def test_swapped_weights_are_detected(directory: Path, one: str, other: str) -> None:
    compare(directory, swapped(one, other)).assert_exceeded("logprob", margin=MARGIN)


def test_a_dropped_deepstack_is_detected(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embed = PolicyModel._embed

    def without_deepstack(self: PolicyModel, batch: PackedBatch) -> tuple[Tensor, Tensor | None]:
        return embed(self, batch)[0], None

    monkeypatch.setattr(PolicyModel, "_embed", without_deepstack)
    compare(directory).assert_exceeded("logprob", margin=MARGIN)


def test_features_of_another_image_are_detected(directory: Path) -> None:
    """Features counted anew in every sequence: the second image of a row would be the first."""

    def counted_by_sequence(batch: PackedBatch) -> PackedBatch:
        index = batch.vision_index.clone()
        for segment in batch.segment_ids.unique():
            own = (batch.segment_ids == segment) & (index >= 0)
            index[own] -= index[own].min() if own.any() else 0
        return replace(batch, vision_index=index)

    compare(directory, change=counted_by_sequence).assert_exceeded("logprob", margin=MARGIN)


def test_attention_over_neighbours_is_detected(directory: Path) -> None:
    """A row taken for one long sequence: what a missing segment mask would do."""

    def unsegmented(batch: PackedBatch) -> PackedBatch:
        ends = batch.cu_seqlens_padded[[0, -1]]
        return replace(batch, cu_seqlens=ends, cu_seqlens_padded=ends)

    compare(directory, change=unsegmented).assert_exceeded("logprob", margin=MARGIN)
