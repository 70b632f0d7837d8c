# SPDX-License-Identifier: Apache-2.0
"""One of two ranks of the trap tests: mistakes that need several ranks, layout after layout. Usage: DIRECTORY

Each function makes one mistake in a policy of its layout, or takes one to an input that has been fatal elsewhere, and
returns the errors against transformers. ``test_traps.py`` says what they must be; the docstrings, where it was met.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from torch import Tensor

from megatron_g2rpo.policy import attention, megatron, passes, process_groups
from megatron_g2rpo.policy.device import init_process_group
from megatron_g2rpo.policy.layouts import context_parallel
from megatron_g2rpo.policy.layouts.image_shares import assign_images
from megatron_g2rpo.policy.megatron import LossTerms, MegatronPolicy
from megatron_g2rpo.types import NO_LABEL, PackedBatch, TokenStats
from tests.common.compare import Report
from tests.common.hardware import this_device
from tests.common.launch import report_result
from tests.common.parity import packer_for, toy_loss
from tests.common.policy_layout import layout_options
from tests.common.traps import Baseline, measure

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "tp2": {"tp": 2},
    "tp2-sp": {"tp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2},
    "cp2": {"cp": 2},
}
Make = Callable[[MegatronPolicy, Baseline], Report]


@dataclass(frozen=True)
class Trap:
    """One mistake, or one hard input.

    Attributes:
        layout: of ``LAYOUTS``.
        make: runs it.
        detected: kinds of error that must show it; empty where nothing may be wrong.
        rejected: part of the message with which it is rejected; None where it is not.
    """

    layout: str
    make: Make
    detected: tuple[str, ...] = ()
    rejected: str | None = None

    @property
    def name(self) -> str:
        return f"{self.layout}: {self.make.__name__}"


TRAPS: list[Trap] = []


def detected(layout: str, *kinds: str) -> Callable[[Make], Make]:
    """Marks a mistake that these kinds of error must show."""
    return lambda make: (TRAPS.append(Trap(layout, make, detected=kinds)), make)[1]


def correct(layout: str) -> Callable[[Make], Make]:
    """Marks an input that must give what transformers gives."""
    return lambda make: (TRAPS.append(Trap(layout, make)), make)[1]


def rejected(layout: str, message: str) -> Callable[[Make], Make]:
    """Marks a mistake that must end in an error, on both ranks."""
    return lambda make: (TRAPS.append(Trap(layout, make, rejected=message)), make)[1]


def build(baseline: Baseline, layout: str, **megatron_cfg: Any) -> MegatronPolicy:
    section = layout_options(baseline.directory, **LAYOUTS[layout], **megatron_cfg)
    return MegatronPolicy(section, this_device(), seed=0, max_steps=10)


# -- context parallelism ------------------------------------------------------------------------------------------


def with_shares(change: Callable[[PackedBatch, PackedBatch, int], PackedBatch]) -> Any:
    """A policy whose shares are ``change(row, right share, rank)``."""
    split = context_parallel.split
    return patch.object(context_parallel, "split", lambda row, size, rank: change(row, split(row, size, rank), rank))


@detected("cp2", "logprob", "loss", "gradient")
def labels_are_shifted_on_the_share(policy: MegatronPolicy, baseline: Baseline) -> Report:
    """The next token of a chunk's last one is on another rank (verl's pull request 4250)."""

    def shifted(row: PackedBatch, share: PackedBatch, rank: int) -> PackedBatch:
        return replace(share, labels=torch.where(share.labels == NO_LABEL, NO_LABEL, share.tokens.roll(-1)))

    with with_shares(shifted):
        return measure(policy, baseline)


@detected("cp2", "logprob", "loss", "gradient")
def positions_are_counted_on_the_share(policy: MegatronPolicy, baseline: Baseline) -> Report:
    """Each rank counts from 0, as if its tokens were a row."""

    def counted(row: PackedBatch, share: PackedBatch, rank: int) -> PackedBatch:
        return replace(share, position_ids=torch.arange(len(share.tokens)).expand(3, -1))

    with with_shares(counted):
        return measure(policy, baseline)


@detected("cp2", "logprob", "loss", "gradient")
def positions_are_cut_as_one_sequence(policy: MegatronPolicy, baseline: Baseline) -> Report:
    """megatron-core's multimodal rotary embedding cuts the row into chunks, and not each sequence."""

    def cut(row: PackedBatch, share: PackedBatch, rank: int) -> PackedBatch:
        places = context_parallel.local_tokens(row.cu_seqlens_padded[[0, -1]], 2, rank)
        return replace(share, position_ids=row.position_ids[:, places])

    with with_shares(cut):
        return measure(policy, baseline)


@detected("cp2", "logprob", "entropy")
def image_features_are_counted_on_the_share(policy: MegatronPolicy, baseline: Baseline) -> Report:
    """Features go to the placeholders of the share in their order there (verl's pull request 3998)."""

    def counted(row: PackedBatch, share: PackedBatch, rank: int) -> PackedBatch:
        index = share.vision_index.clone()
        for segment in row.segment_ids[row.vision_index >= 0].unique():
            own = (share.segment_ids == segment) & (index >= 0)
            first = row.vision_index[(row.segment_ids == segment) & (row.vision_index >= 0)].min()
            index[own] = torch.arange(int(own.sum())) + first
        return replace(share, vision_index=index)

    with with_shares(counted):
        return measure(policy, baseline)


@detected("cp2", "logprob", "loss", "gradient")
def sequences_are_cut_in_two_and_not_in_zigzag(policy: MegatronPolicy, baseline: Baseline) -> Report:
    """Another split than the one that the core attention expects."""

    def halves(cu_seqlens_padded: Tensor, size: int, rank: int) -> Tensor:
        offsets = cu_seqlens_padded.tolist()
        parts = []
        for start, end in pairwise(offsets):
            parts.append(torch.arange(start, end).chunk(size)[rank])
        return torch.cat(parts)

    with patch.object(context_parallel, "local_tokens", halves):
        return measure(policy, baseline)


@detected("cp2", "logprob", "entropy")
def shares_are_put_together_rank_by_rank(policy: MegatronPolicy, baseline: Baseline) -> Report:
    """Gathered log-probabilities in the order of the gather."""
    in_order = patch.object(
        context_parallel, "gathered_places", lambda cu_seqlens, size: torch.arange(int(cu_seqlens[-1]))
    )
    with in_order:
        return measure(policy, baseline)


@detected("cp2", "gradient")
def gathered_keys_send_no_gradient_back(policy: MegatronPolicy, baseline: Baseline) -> Report:
    """A gather of detached peers: each rank's keys learn from its own queries alone."""

    def detached(input_: Tensor, tensor_parallel_output_grad: bool, group: Any) -> Tensor:
        return gather(input_, tensor_parallel_output_grad=False, group=group)

    gather = attention.gather_from_sequence_parallel_region
    with patch.object(attention, "gather_from_sequence_parallel_region", detached):
        return measure(policy, baseline)


@detected("cp2", "loss", "gradient")
def the_loss_is_multiplied_by_context_ranks(policy: MegatronPolicy, baseline: Baseline) -> Report:
    """What makes up for an average over them, where gradients are summed (verl's issue 6609, SkyRL's 1751)."""

    def multiplied(batch: PackedBatch, stats: TokenStats) -> LossTerms:
        terms = toy_loss(batch, stats)
        return replace(terms, loss=2 * terms.loss)

    return measure(policy, baseline, loss=multiplied)


@detected("cp2", "loss", "gradient")
def every_context_rank_counts_the_tokens_of_the_row(policy: MegatronPolicy, baseline: Baseline) -> Report:
    """The divisor is summed over context-parallel ranks as well."""

    def of_the_row(batch: PackedBatch, stats: TokenStats) -> LossTerms:
        terms = toy_loss(batch, stats)
        count = torch.tensor(terms.num_tokens)
        dist.all_reduce(count, group=policy.groups.context)
        return replace(terms, num_tokens=int(count))

    return measure(policy, baseline, loss=of_the_row)


@detected("cp2", "gradient")
def the_loss_function_returns_two_values(policy: MegatronPolicy, baseline: Baseline) -> Report:
    """megatron-core multiplies by context-parallel ranks, and divides by micro-batches (``schedules.py``)."""
    three = passes.of_micro_batch
    with patch.object(passes, "of_micro_batch", lambda *arguments: three(*arguments)[::2]):
        return measure(policy, baseline)


@detected("cp2", "loss", "gradient")
def calculate_per_token_loss_is_off(policy: MegatronPolicy, baseline: Baseline) -> Report:
    """Ranks and micro-batches are averaged, whatever their tokens; ``check_normalisation`` would refuse it."""
    with patch.object(megatron, "transformer_config", _averaging), patch.object(megatron, "check_normalisation"):
        averaging = build(baseline, "cp2")
    return measure(averaging, baseline)


def _averaging(*arguments: Any) -> Any:
    config = transformer_config(*arguments)
    config.calculate_per_token_loss = False
    return config


transformer_config = megatron.transformer_config


@correct("cp2")
def image_spans_cross_the_borders_of_chunks(policy: MegatronPolicy, baseline: Baseline) -> Report:
    """Features are looked up on the row, so that a rank may have a part of an image."""
    rows = baseline.rows(policy)
    apart = 0
    for row in rows:
        on_first = torch.zeros(len(row.tokens), dtype=torch.bool)
        on_first[context_parallel.local_tokens(row.cu_seqlens_padded, 2, 0)] = True
        follows = (row.vision_index[1:] == row.vision_index[:-1] + 1) & (row.vision_index[:-1] >= 0)
        apart += int((follows & (on_first[1:] != on_first[:-1])).sum())
    assert apart, "no image crosses a border"
    return measure(policy, baseline, rows)


@correct("cp2")
def a_rank_has_padding_only(policy: MegatronPolicy, baseline: Baseline) -> Report:
    """Two tokens padded to eight: all attention on the other rank, which waits for the gradient of its keys."""
    packer = replace(packer_for(policy.hf_config, policy.layout), sequence_multiple=8, row_multiple=8)
    rows = baseline.rows(policy, packer)
    shares = [[context_parallel.split(row, 2, rank) for row in rows] for rank in range(2)]
    assert [any(not (share.segment_ids >= 0).any() for share in of) for of in shares] == [False, True]
    return measure(policy, baseline, rows)


@correct("cp2")
def a_rank_needs_the_image_that_the_other_encodes(policy: MegatronPolicy, baseline: Baseline) -> Report:
    """One has no image token, the other no image: both are waited for, forward and backward."""
    packer = packer_for(policy.hf_config, policy.layout)
    rows = []
    for index, sequence in enumerate(baseline.sequences):
        (row,) = packer.pack([sequence], 96)
        rows.append(replace(row, sequence_ids=torch.tensor([index])))

    def needed(row: PackedBatch, rank: int) -> bool:
        return bool((context_parallel.split(row, 2, rank).vision_index >= 0).any())

    lonely = [row for row in rows if len(row.image_grid_thw) == 1 and needed(row, 1) and not needed(row, 0)]
    assert lonely
    assert assign_images([24], 2) == [[0], []]
    return measure(policy, baseline, rows)


# -- tensor and sequence parallelism ------------------------------------------------------------------------------


@detected("tp2", "entropy")
def padding_of_the_vocabulary_is_in_the_softmax(policy: MegatronPolicy, baseline: Baseline) -> Report:
    """Zero rows of the output matrix contribute ``exp(0)`` each; one of them is enough."""
    layer = policy.model.language_model.output_layer
    assert layer.vocab_size == 161
    with patch.object(layer, "vocab_size", 162):
        return measure(policy, baseline)


@detected("tp2", "gradient")
def gradients_of_query_and_key_norms_are_not_summed(policy: MegatronPolicy, baseline: Baseline) -> Report:
    """Each rank's heads give a part; megatron-core finds the norms by name, and by this switch."""
    with patch.object(policy.config, "qk_layernorm", False):
        return measure(policy, baseline)


@detected("tp2", "gradient")
def gradients_of_the_vision_tower_are_not_averaged(policy: MegatronPolicy, baseline: Baseline) -> Report:
    """The rank that encodes an image has twice its gradient, the other none of it."""
    assert policy.model.vision_model is not None
    parameters = list(policy.model.vision_model.parameters())
    try:
        for parameter in parameters:
            parameter.average_gradients_across_tp_domain = False  # type: ignore[attr-defined]
        return measure(policy, baseline)
    finally:
        for parameter in parameters:
            parameter.average_gradients_across_tp_domain = True  # type: ignore[attr-defined]


@detected("tp2-sp", "gradient")
def gradients_of_the_vision_tower_are_summed(policy: MegatronPolicy, baseline: Baseline) -> Report:
    """As those of layers that saw a part of the tokens: both ranks have twice the gradient."""
    policy = build(baseline, "tp2-sp")
    assert policy.model.vision_model is not None
    for parameter in policy.model.vision_model.parameters():
        parameter.average_gradients_across_tp_domain = False  # type: ignore[attr-defined]
        parameter.sequence_parallel = True  # type: ignore[attr-defined]
    return measure(policy, baseline)


@detected("tp2-sp", "gradient")
def norms_are_not_marked_as_sequence_parallel(policy: MegatronPolicy, baseline: Baseline) -> Report:
    """Each rank's norms saw a part of the tokens; megatron-core sums the gradients of what is marked."""
    policy = build(baseline, "tp2-sp")
    # By name: Transformer Engine's layers fold most norms into the matrix products after them.
    language = dict(policy.model.language_model.named_parameters())
    norms = [weight for name, weight in language.items() if "norm" in name]
    assert norms
    assert all(weight.sequence_parallel for weight in norms)  # type: ignore[attr-defined]
    for weight in norms:
        weight.sequence_parallel = False  # type: ignore[attr-defined]
    return measure(policy, baseline)


@rejected("tp2-sp", "divisible by tensor parallel size")
def rows_are_not_padded_for_sequence_parallelism(policy: MegatronPolicy, baseline: Baseline) -> Report:
    """A row of odd length has no halves."""
    rows = baseline.rows(policy, packer_for(policy.hf_config))
    assert any(len(row.tokens) % 2 for row in rows)
    return measure(policy, baseline, rows)


# -- pipeline parallelism -----------------------------------------------------------------------------------------


@detected("pp2", "gradient")
def copies_of_the_tied_weight_are_not_summed(policy: MegatronPolicy, baseline: Baseline) -> Report:
    """``share_embeddings_and_output_weights`` says no: each stage keeps its part of the gradient."""

    def finalize(*arguments: Any, **keywords: Any) -> None:
        with patch.object(policy.model, "share_embeddings_and_output_weights", False):
            finalize_model_grads(*arguments, **keywords)

    with patch.object(policy.config, "finalize_model_grads_func", finalize):
        return measure(policy, baseline)


@detected("pp2", "logprob", "entropy", "gradient")
def deepstack_reaches_beyond_the_first_stage(policy: MegatronPolicy, baseline: Baseline) -> Report:
    """The second layer's features are dropped with the first stage's end; ``check_model`` would refuse it."""
    with patch.object(megatron, "check_model"):
        short = build(baseline, "pp2", num_layers_in_first_pipeline_stage=1)
    return measure(short, baseline)


# -- data parallelism ---------------------------------------------------------------------------------------------


@correct("dp2")
def a_rank_has_no_rows(policy: MegatronPolicy, baseline: Baseline) -> Report:
    """Its loss counts no token, and its part of every collective is waited for."""
    return measure(policy, baseline, baseline.rows(policy, idle=True))


@detected("dp2", "loss", "gradient")
def the_loss_is_a_mean_over_each_rank(policy: MegatronPolicy, baseline: Baseline) -> Report:
    """A mean over ranks, whatever their tokens: what data parallelism means where losses are means."""
    rows = baseline.rows(policy)
    mine = sum(row.num_tokens for row in rows)
    counts = iter([1] + [0] * (len(rows) - 1))  # one for every rank

    def mean(batch: PackedBatch, stats: TokenStats) -> LossTerms:
        terms = toy_loss(batch, stats)
        return replace(terms, loss=terms.loss / mine, num_tokens=next(counts))

    return measure(policy, baseline, rows, loss=mean)


@rejected("dp2", "a loss must report the same metrics in every micro-batch and on every rank")
def a_metric_is_reported_by_one_rank(policy: MegatronPolicy, baseline: Baseline) -> Report:
    """A sum over ranks would abort, or wait for ever: a metric of a task that the other rank has nothing of."""

    def reported(batch: PackedBatch, stats: TokenStats) -> LossTerms:
        terms = toy_loss(batch, stats)
        return replace(terms, sums={**terms.sums, "task": torch.ones(())} if dist.get_rank() else terms.sums)

    return measure(policy, baseline, loss=reported)


# -----------------------------------------------------------------------------------------------------------------


def outcome(make: Callable[[], Report]) -> dict[str, Any]:
    """The worst errors, or this rank's message where the mistake was rejected."""
    try:
        result: dict[str, Any] = {"worst": make().worst}
    except Exception as error:  # noqa: BLE001  # which one, is for the test to say
        result = {"rejected": f"{type(error).__name__}: {error}"}
    both: list[dict[str, Any]] = [result] * 2
    dist.all_gather_object(both, result)
    assert both[0].keys() == both[1].keys(), both
    return result


def run_layout(baseline: Baseline, layout: str) -> dict[str, dict[str, Any]]:
    """The layout without a mistake, then with each."""
    policy = build(baseline, layout)
    results = {layout: outcome(partial(measure, policy, baseline))}
    for trap in TRAPS:
        if trap.layout == layout:
            results[trap.name] = outcome(partial(trap.make, policy, baseline))
    return results


def main() -> None:
    directory = Path(sys.argv[1])
    baseline = Baseline.load(directory)
    init_process_group(this_device())
    results = {}
    for layout in LAYOUTS:
        results |= run_layout(baseline, layout)
        process_groups.reset()
    report_result(results)


if __name__ == "__main__":
    main()
