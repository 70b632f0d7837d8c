# SPDX-License-Identifier: Apache-2.0
"""Claim: known mistakes of packing and of the loss are refused, or detected by the parity tests by a wide margin.

Each test makes one on purpose and says where it was met. Others are elsewhere: those that need several ranks in
``tests/parallel/test_traps.py``; weights and features in the wrong place in ``test_silent_errors.py``; the chunked
rotary layout in ``test_parity.py``; logits changed in place, or rounded before the loss, in ``test_logprobs.py``; rows
that cannot be cut in ``test_context_parallel.py``; a first stage that deepstack reaches beyond in ``test_layout.py``; a
metric that only some micro-batches report in ``test_update.py``; norms folded into Transformer Engine's linears in
``tests/unit/weights``; Adam's step counter, shared after a load, in ``tests/parallel/test_checkpoint_layouts.py``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_g2rpo import recipe as recipes
from megatron_g2rpo.policy import layer_spec, megatron, output_layer, passes
from megatron_g2rpo.policy.device import select
from megatron_g2rpo.policy.megatron import LossTerms, MegatronPolicy
from megatron_g2rpo.policy.model import PolicyModel
from megatron_g2rpo.policy.optimizer import check_normalisation
from megatron_g2rpo.train.step.losses import G2RPOLoss, TaskEntropies, entropy_bounds
from megatron_g2rpo.types import NO_LABEL, PackedBatch, TokenStats
from tests.common.compare import largest_distance
from tests.common.parity import TASKS, TEMPERATURE, random_sequences, toy_loss
from tests.common.policy_layout import layout_options
from tests.common.recipes import G2RPO
from tests.common.tiny_model import hf_logits, make_tiny_qwen3vl
from tests.common.traps import MARGIN, SHAPE, TOLERANCES, Baseline, measure


def build(baseline: Baseline, **layout: Any) -> MegatronPolicy:
    return MegatronPolicy(layout_options(baseline.directory, **layout), select("cpu"), seed=0, max_steps=10)


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Baseline:
    return Baseline.make(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def policy(baseline: Baseline) -> MegatronPolicy:
    return build(baseline)


@pytest.fixture(scope="module")
def rows(policy: MegatronPolicy, baseline: Baseline) -> list[PackedBatch]:
    rows = baseline.rows(policy)
    assert max(len(row.sequence_ids) for row in rows) > 1
    return rows


def sequences_of(row: PackedBatch) -> Iterator[slice]:
    """Where each sequence of a row is, padding included."""
    for start, end in pairwise(row.cu_seqlens_padded.tolist()):
        yield slice(start, end)


def gradients(policy: MegatronPolicy) -> dict[str, Tensor]:
    """A copy of those of the last ``policy.gradients``, by Hugging Face name."""
    return {name: tensor.clone() for name, tensor in policy.stream(lambda parameter: parameter.main_grad)}


def test_without_a_mistake_every_error_is_within_tolerance(policy: MegatronPolicy, baseline: Baseline) -> None:
    measure(policy, baseline).assert_within_tolerance()


# -- packing --------------------------------------------------------------------------------------------------------


def test_the_last_token_of_a_sequence_wraps_to_the_next(
    policy: MegatronPolicy, baseline: Baseline, rows: list[PackedBatch]
) -> None:
    """Labels rolled over the packed row, and not within each sequence.

    A response's tokens do not show it, so that the loss here is that of language modelling, over all tokens.
    """

    def every_token(batch: PackedBatch, stats: TokenStats) -> LossTerms:
        count = int((batch.labels != NO_LABEL).sum())
        return LossTerms(loss=-stats.logprobs.sum(), num_tokens=count, sums={})

    def rolled(row: PackedBatch) -> PackedBatch:
        return replace(row, labels=torch.where(row.segment_ids >= 0, row.tokens.roll(-1), NO_LABEL))

    def shifted(row: PackedBatch) -> PackedBatch:
        last = row.segment_ids != row.segment_ids.roll(-1)
        last[-1] = True
        return replace(row, labels=torch.where(last, NO_LABEL, rolled(row).labels))

    _, model = make_tiny_qwen3vl(**SHAPE)
    total, count = 0.0, 0
    for sequence in baseline.sequences:
        tokens = torch.cat([sequence.inputs.token_ids, sequence.response_ids])[1:, None]
        with torch.no_grad():
            logits = hf_logits(model, sequence.inputs, sequence.response_ids)[:-1]
        total -= float(logits.log_softmax(-1).gather(1, tokens).double().sum())
        count += len(tokens)
    metrics = policy.gradients([shifted(row) for row in rows], every_token)
    assert metrics["num_tokens"] == count
    assert metrics["loss"] == pytest.approx(total / count, rel=TOLERANCES["loss"])
    right = gradients(policy)
    metrics = policy.gradients([rolled(row) for row in rows], every_token)
    assert metrics["num_tokens"] == count + len(baseline.sequences)
    assert largest_distance(gradients(policy), right) > MARGIN * TOLERANCES["gradient"]


def test_the_mask_is_on_the_token_and_not_on_the_position_that_predicts_it(
    policy: MegatronPolicy, baseline: Baseline, rows: list[PackedBatch]
) -> None:
    """What the loss reads, one position too far: labels shifted, masks not."""
    names = ("loss_mask", "task_ids", "advantages", "behaviour_logprobs", "token_weights")
    shifted = [replace(row, **{name: getattr(row, name).roll(1) for name in names}) for row in rows]
    measure(policy, baseline, shifted).assert_exceeded("logprob", "loss", "gradient", margin=MARGIN)


def test_positions_count_the_tokens_of_the_row(
    policy: MegatronPolicy, baseline: Baseline, rows: list[PackedBatch]
) -> None:
    """What megatron-core assumes of a batch without position ids."""
    counted = [replace(row, position_ids=torch.arange(len(row.tokens)).expand(3, -1)) for row in rows]
    measure(policy, baseline, counted).assert_exceeded("logprob", "loss", "gradient", margin=MARGIN)


def test_every_sequence_has_the_positions_of_the_first(
    policy: MegatronPolicy, baseline: Baseline, rows: list[PackedBatch]
) -> None:
    """megatron-core's rotary embedding of packed ("thd") rows, where angles are longer than it expects."""

    def restarted(row: PackedBatch) -> PackedBatch:
        first = [row.position_ids[:, : place.stop - place.start] for place in sequences_of(row)]
        return replace(row, position_ids=torch.cat(first, dim=1))

    measure(policy, baseline, [restarted(row) for row in rows]).assert_exceeded(
        "logprob", "loss", "gradient", margin=MARGIN
    )


def test_positions_run_on_over_the_row(policy: MegatronPolicy, baseline: Baseline, rows: list[PackedBatch]) -> None:
    """Positions that do not start again with every sequence (Megatron-Bridge's pull request 1868).

    Rotary embeddings see differences only, so that short rows do not show it: what it costs is the precision of the
    angles, which comparisons see far into a row only. Hence the packer's own rows are held to start at 0.
    """

    def run_on(row: PackedBatch, offset: int) -> PackedBatch:
        positions = row.position_ids.clone()
        for place in sequences_of(row):
            length = int(positions[:, place].max()) + 1
            positions[:, place] += offset
            offset += length
        return replace(row, position_ids=positions)

    assert all(not row.position_ids[:, place.start].any() for row in rows for place in sequences_of(row))
    measure(policy, baseline, [run_on(row, 0) for row in rows]).assert_within_tolerance()
    measure(policy, baseline, [run_on(row, 250_000) for row in rows]).assert_exceeded(
        "logprob", "gradient", margin=MARGIN
    )


def test_more_image_placeholders_than_features_are_refused(policy: MegatronPolicy, rows: list[PackedBatch]) -> None:
    """Placeholders expanded twice, or another processor's (EasyR1's issue 83, OpenRLHF's issue 1220)."""
    row = next(row for row in rows if len(row.image_grid_thw))
    with pytest.raises(ValueError, match="the row has an image placeholder for feature"):
        policy.logprobs([replace(row, vision_index=torch.where(row.vision_index >= 0, row.vision_index + 1, -1))])


def test_rotary_frequencies_are_rounded(baseline: Baseline) -> None:
    """What ``Module.bfloat16()`` does to a rotary table that is a buffer."""
    policy = build(baseline)
    rotary = policy.model.rotary_pos_emb
    rotary.inv_freq = rotary.inv_freq.bfloat16().float()
    measure(policy, baseline).assert_exceeded("gradient", margin=MARGIN)


def test_rotary_frequencies_of_the_vision_tower_are_rounded(tmp_path: Path) -> None:
    """The same in the tower, whose tables are buffers: 0.1 rad at patch 60, so the image here is that tall.

    The tiny tower's attention is nearly even, and hides most of it: hence the smaller margin.
    """
    config, _ = make_tiny_qwen3vl(**SHAPE)
    tall = Baseline.make(tmp_path, random_sequences(config, grids=(((64, 2),),)))
    policy = build(tall)
    measure(policy, tall).assert_within_tolerance()
    assert policy.model.vision_model is not None
    tables = [buffer for name, buffer in policy.model.vision_model.named_buffers() if "inv_freq" in name]
    assert tables
    for table in tables:
        table.copy_(table.bfloat16())
    measure(policy, tall).assert_exceeded("gradient", margin=10)


# -- the loss -------------------------------------------------------------------------------------------------------


def test_a_loss_function_returns_two_values(
    policy: MegatronPolicy, baseline: Baseline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """megatron-core then divides by micro-batches, and by no token (verl's issue 6609)."""
    three = passes.of_micro_batch
    monkeypatch.setattr(passes, "of_micro_batch", lambda *arguments: three(*arguments)[::2])
    measure(policy, baseline).assert_exceeded("gradient", margin=MARGIN)


def test_the_loss_is_a_mean_of_the_micro_batch(policy: MegatronPolicy, baseline: Baseline) -> None:
    """verl's Megatron actor up to 2025: a mean of means depends on how rows are packed."""

    def mean(batch: PackedBatch, stats: TokenStats) -> LossTerms:
        terms = toy_loss(batch, stats)
        return replace(terms, loss=terms.loss / max(terms.num_tokens, 1), num_tokens=1)

    measure(policy, baseline, loss=mean).assert_exceeded("loss", "gradient", margin=MARGIN)


def test_calculate_per_token_loss_is_off(baseline: Baseline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused; megatron-core would divide every micro-batch by its own tokens, and by their number."""

    def without(*arguments: Any) -> Any:
        config = transformer_config(*arguments)
        config.calculate_per_token_loss = False
        return config

    transformer_config = megatron.transformer_config
    monkeypatch.setattr(megatron, "transformer_config", without)
    with pytest.raises(RuntimeError, match="calculate_per_token_loss is off"):
        build(baseline)
    monkeypatch.setattr(megatron, "check_normalisation", lambda *_: None)
    measure(build(baseline), baseline).assert_exceeded("loss", "gradient", margin=MARGIN)


def test_gradients_are_scaled_before_they_are_summed(baseline: Baseline) -> None:
    """Refused: a factor of DDP's own, next to the division by tokens."""
    policy = build(baseline)
    assert policy._ddp is not None
    for buffer in policy._ddp.buffers:
        for part in (buffer, *buffer.buckets):
            part.gradient_scaling_factor = 0.5
    with pytest.raises(RuntimeError, match=r"gradient buffers scale by \[0\.5\]"):
        check_normalisation(policy.config, policy._ddp)
    measure(policy, baseline).assert_exceeded("gradient", margin=MARGIN)


def test_gradients_are_averaged_over_ranks(policy: MegatronPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused: data-parallel ranks would be averaged whatever their tokens."""
    assert policy._ddp is not None
    monkeypatch.setattr(policy._ddp.ddp_config, "average_in_collective", True)
    with pytest.raises(RuntimeError, match="average_in_collective is on"):
        check_normalisation(policy.config, policy._ddp)


def test_a_loss_is_constant_where_no_token_counts(policy: MegatronPolicy, rows: list[PackedBatch]) -> None:
    """Refused: that rank would not take part in the backward pass, and its peers would wait for ever (slime)."""

    def constant(batch: PackedBatch, stats: TokenStats) -> LossTerms:
        return LossTerms(loss=torch.zeros(()), num_tokens=0, sums={})

    with pytest.raises(ValueError, match="does not depend on the policy's log-probabilities"):
        policy.gradients(rows, constant)


def test_the_entropy_hinge_is_taken_in_every_micro_batch(policy: MegatronPolicy, rows: list[PackedBatch]) -> None:
    """OpenVLThinker's training code: the gradient depends on which sequences share a row (a hinge is not a sum)."""
    stats = policy.logprobs(rows, TEMPERATURE)
    behaviour = [replace(row, old_logprobs=stat.logprobs) for row, stat in zip(rows, stats, strict=True)]
    everything = TaskEntropies.of(behaviour, stats, TASKS, policy.groups.data)
    # Just below the means: a hinge of a row's own mean is off where that is a little lower.
    highs = {f"task_{task}": float(mean) - 0.05 for task, mean in enumerate(everything.mean)}
    tasks = {task: {"entropy": {"low": 0.0, "high": high}} for task, high in highs.items()}
    overrides = ["loss_fn.entropy_shaping.weight=1.0", f"env.tasks={json.dumps({'_override_': True, **tasks})}"]
    recipe = recipes.load(G2RPO, overrides, "train")

    def run(batches: Sequence[PackedBatch], entropies: Sequence[TaskEntropies]) -> dict[str, Tensor]:
        bounds = entropy_bounds(recipe.env, tuple(tasks))
        losses = iter(
            [G2RPOLoss(recipe.loss_fn, bounds, tuple(tasks), each, policy.groups.context) for each in entropies]
        )
        policy.gradients(batches, lambda batch, stats: next(losses)(batch, stats), TEMPERATURE)
        return gradients(policy)

    whole = run(behaviour, [everything] * len(rows))
    assert largest_distance(run(behaviour[::-1], [everything] * len(rows)), whole) <= TOLERANCES["gradient"]
    group = policy.groups.data
    apart = [TaskEntropies.of([row], [stat], TASKS, group) for row, stat in zip(behaviour, stats, strict=True)]
    assert largest_distance(run(behaviour, apart), whole) > MARGIN * TOLERANCES["gradient"]


def test_the_chunk_size_is_ignored_in_training(
    policy: MegatronPolicy, rows: list[PackedBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NeMo-RL's issue 2871: whole logits where they do not fit. Memory: ``test_logprobs.py``."""
    chunks: list[int | None] = []

    def recorded(*arguments: Any, chunk_size: int | None, **keywords: Any) -> Tensor:
        chunks.append(chunk_size)
        return linear_logprobs(*arguments, chunk_size=chunk_size, **keywords)

    linear_logprobs = output_layer.linear_logprobs
    monkeypatch.setattr(output_layer, "linear_logprobs", recorded)
    policy.logprobs(rows)
    policy.gradients(rows, toy_loss)
    assert chunks == [policy.settings.logprob_chunk_size] * (2 * len(rows))


# -- what megatron-core must be told --------------------------------------------------------------------------------


def test_deepstack_features_are_kept_outside_of_the_checkpointed_arguments(
    baseline: Baseline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hook that reads stored features works until activations are recomputed; then autograd refuses."""
    stored: list[Tensor | None] = []

    class Hooked(TransformerLayer):
        def forward(self, *args: Any, context: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, None]:
            hidden: Tensor = super().forward(*args, context=None, **kwargs)[0]
            features = stored[-1]
            if features is not None and self.layer_number <= len(features):
                hidden = hidden + features[self.layer_number - 1]
            return hidden, None

    def embed(self: PolicyModel, batch: PackedBatch) -> tuple[Tensor, None]:
        embeddings, features = _embed(self, batch)
        stored.append(features)
        return embeddings, None

    _embed = PolicyModel._embed
    monkeypatch.setattr(layer_spec, "DeepstackLayer", Hooked)
    monkeypatch.setattr(PolicyModel, "_embed", embed)
    measure(build(baseline), baseline).assert_within_tolerance()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        measure(build(baseline, recompute_granularity="full"), baseline)


def test_the_vision_tower_does_not_run_on_a_row_without_images(baseline: Baseline) -> None:
    """megatron-core's overlapped gradient reduction waits for every parameter of a bucket, and refuses."""
    policy = build(baseline, mode="overlap")
    assert not len(baseline.rows(policy)[-1].image_grid_thw)
    measure(policy, baseline).assert_within_tolerance()
    assert policy.model._encode_images is not None
    policy.model._encode_images._every_row = False
    with pytest.raises(AssertionError, match="Communication call has not been issued for this bucket"):
        measure(policy, baseline)


def test_every_micro_batch_reduces_its_gradients(baseline: Baseline) -> None:
    """megatron-core's schedules overlap every backward pass, unless they are told how not to (``no_sync_func``)."""
    policy = build(baseline, mode="distributed-overlap")
    measure(policy, baseline).assert_within_tolerance()
    policy.config.no_sync_func = None
    measure(policy, baseline).assert_exceeded("gradient", margin=MARGIN)
