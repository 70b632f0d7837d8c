# SPDX-License-Identifier: Apache-2.0
"""Claim: rows in which groups share their prompt compute what transformers computes for every sequence alone.

Then the mistakes that sharing invites: each is made on purpose, raises nothing, and is detected by the comparison by a
wide margin. The layouts are in ``tests/parallel``: each case of the matrix is compared with and without sharing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_g2rpo.data.packing import PackSequence
from megatron_g2rpo.policy import packed_row
from megatron_g2rpo.policy.attention import PackedCoreAttention
from megatron_g2rpo.policy.device import select
from megatron_g2rpo.policy.layouts.attention_pieces import Piece
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.policy.packed_row import Bucket
from megatron_g2rpo.types import PackedBatch
from tests.common.parity import packer_for
from tests.common.policy_layout import layout_options
from tests.common.tiny_model import random_inputs, special_tokens, tiny_config
from tests.common.traps import MARGIN, SHAPE, TOLERANCES, Baseline, measure

# No image, one, and two of different sizes.
GRIDS = ((), ((4, 6),), ((2, 4), (6, 4)))


def groups(lengths: Sequence[Sequence[int]], seed: int = 0) -> list[PackSequence]:
    """Return a group of answers of the given lengths to each of as many prompts, which have the images of ``GRIDS``."""
    config = tiny_config(vocab=SHAPE["vocab"])
    generator = torch.Generator().manual_seed(seed)
    text = special_tokens(SHAPE["vocab"]).num_text
    grids = [GRIDS[index % len(GRIDS)] for index in range(len(lengths))]
    return [
        PackSequence(
            inputs=inputs,
            response_ids=torch.randint(text, (length,), generator=generator),
            advantage=float(torch.randn((), generator=generator)),
            task_id=prompt % 2,
            behaviour_logprobs=-5 + torch.randn(length, generator=generator),
            token_weight=0.5 + sample % 3,
        )
        for prompt, (inputs, of_prompt) in enumerate(zip(random_inputs(config, grids=grids), lengths, strict=True))
        for sample, length in enumerate(of_prompt)
    ]


LENGTHS = {
    "one": [[7], [1], [40]],
    "two": [[1, 9], [12, 3], [5, 5]],
    "eight": [[1, 2, 3, 5, 8, 13, 21, 34], [9] * 8, [1, 200, 3, 60, 17, 1, 1, 90]],
    "thirteen": [list(range(1, 14)), [20] * 13, [1, 64] * 6 + [5]],
    "mixed": [[4], [6, 2, 33], [1, 1, 1, 150, 2, 2, 2, 2]],
}


@pytest.fixture(scope="module")
def baselines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Baseline]:
    made: dict[str, Baseline] = {}

    def of(name: str) -> Baseline:
        if name not in made:
            made[name] = Baseline.make(tmp_path_factory.mktemp(name), groups(LENGTHS[name]))
        return made[name]

    return of


@pytest.fixture(scope="module")
def policies(baselines: Callable[[str], Baseline]) -> Callable[[str], MegatronPolicy]:
    made: dict[str, MegatronPolicy] = {}

    def of(name: str) -> MegatronPolicy:
        if name not in made:
            made[name] = MegatronPolicy(layout_options(baselines(name).directory), select("cpu"), seed=0, max_steps=10)
        return made[name]

    return of


def rows(policy: MegatronPolicy, baseline: Baseline, budget: int, multiple: int = 1) -> list[PackedBatch]:
    packer = replace(
        packer_for(policy.hf_config, shared_prefix=True), sequence_multiple=multiple, row_multiple=2 * multiple
    )
    return packer.pack(baseline.sequences, budget)


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize(("budget", "multiple"), [(10_000, 1), (260, 1), (10_000, 8)])
def test_a_shared_prompt_changes_no_value_and_no_gradient(
    baselines: Any, policies: Any, name: str, budget: int, multiple: int
) -> None:
    """In one row, with groups that are split over several, and with padding after every segment."""
    policy, baseline = policies(name), baselines(name)
    batches = rows(policy, baseline, budget, multiple)
    assert (len(batches) > 1) == (budget == 260 and name in ("eight", "thirteen", "mixed"))
    assert any((batch.parents >= 0).any() for batch in batches) == (name != "one")
    measure(policy, baseline, batches).assert_within_tolerance()


@pytest.fixture(scope="module")
def baseline(baselines: Callable[[str], Baseline]) -> Baseline:
    return baselines("eight")


@pytest.fixture(scope="module")
def policy(policies: Callable[[str], MegatronPolicy]) -> MegatronPolicy:
    return policies("eight")


@pytest.fixture(scope="module")
def row(policy: MegatronPolicy, baseline: Baseline) -> PackedBatch:
    (row,) = rows(policy, baseline, 10_000)
    return row


def assert_detected(policy: MegatronPolicy, baseline: Baseline, row: PackedBatch, *kinds: str) -> None:
    report = measure(policy, baseline, [row])
    for kind in kinds:
        assert report.worst[kind][0] > MARGIN * TOLERANCES[kind], (kind, report.worst[kind])


def test_an_answer_sees_its_sibling(
    policy: MegatronPolicy, baseline: Baseline, row: PackedBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces_of_row = packed_row.pieces_of_row

    def mistaken(*arguments: Any) -> list[Piece]:
        # Behind its trunk lies the first branch: what a causal mask over the row would show to the others.
        pieces = pieces_of_row(*arguments)
        first = {piece.prefix_start: piece for piece in reversed(pieces) if piece.prefix}
        return [
            replace(piece, prefix=piece.prefix + first[piece.prefix_start].length)
            if piece.prefix and piece is not first[piece.prefix_start]
            else piece
            for piece in pieces
        ]

    monkeypatch.setattr(packed_row, "pieces_of_row", mistaken)
    assert_detected(policy, baseline, row, "logprob", "gradient")


def test_an_answer_does_not_see_its_prompt(policy: MegatronPolicy, baseline: Baseline, row: PackedBatch) -> None:
    assert_detected(policy, baseline, replace(row, parents=torch.full_like(row.parents, -1)), "logprob", "gradient")


def test_an_answer_sees_the_prompt_of_another_group(
    policy: MegatronPolicy, baseline: Baseline, row: PackedBatch
) -> None:
    other = int(row.parents.max())
    parents = torch.where(row.parents >= 0, other, row.parents)
    assert_detected(policy, baseline, replace(row, parents=parents), "logprob", "gradient")


def test_positions_run_on_over_siblings(policy: MegatronPolicy, baseline: Baseline, row: PackedBatch) -> None:
    positions, run = row.position_ids.clone(), 0
    for segment, parent in enumerate(row.parents.tolist()):
        where = row.segment_ids == segment
        run = 0 if parent < 0 else run
        positions[:, where] += run
        run += int(where.sum()) if parent >= 0 else 0
    assert_detected(policy, baseline, replace(row, position_ids=positions), "logprob", "gradient")


def test_the_neighbour_of_an_answer_is_a_siblings_last_token(
    policy: MegatronPolicy, baseline: Baseline, row: PackedBatch
) -> None:
    tokens = row.tokens.clone()
    for start, parent in zip(row.cu_seqlens_padded[:-1].tolist(), row.parents.tolist(), strict=True):
        if parent >= 0:
            tokens[start] = row.tokens[start - 1]
    assert_detected(policy, baseline, replace(row, tokens=tokens), "logprob", "gradient")


@pytest.mark.parametrize("factor", [0.0, 8.0])
def test_the_gradient_of_the_prompt_is_counted_never_or_too_often(
    policy: MegatronPolicy, baseline: Baseline, row: PackedBatch, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    attend = PackedCoreAttention._attend

    def mistaken(self: PackedCoreAttention, bucket: Bucket, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if bucket.mask is not None:  # branches
            k, v = (factor * x + (1 - factor) * x.detach() for x in (k, v))
        return attend(self, bucket, q, k, v)

    monkeypatch.setattr(PackedCoreAttention, "_attend", mistaken)
    report = measure(policy, baseline, [row])
    assert report.worst["gradient"][0] > MARGIN * TOLERANCES["gradient"]
    assert report.worst["logprob"][0] <= TOLERANCES["logprob"], "a mistake of the gradient alone"


def test_the_gradient_of_the_prompt_is_that_of_one_answer(
    policy: MegatronPolicy, baseline: Baseline, row: PackedBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend = PackedCoreAttention._attend
    trunks = torch.isin(row.segment_ids, row.parents[row.parents >= 0])[:, None, None]

    def mistaken(self: PackedCoreAttention, bucket: Bucket, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if bucket.mask is None:
            return attend(self, bucket, q, k, v)
        fields = ("queries", "keys", "mask")
        count = len(bucket.queries)
        alone = [replace(bucket, **{name: getattr(bucket, name)[i : i + 1] for name in fields}) for i in range(count)]
        width, parts = bucket.queries.shape[1], []
        for index, one in enumerate(alone):
            mine = bucket.slots.div(width, rounding_mode="floor") == index
            one = replace(one, slots=bucket.slots[mine] - index * width, tokens=bucket.tokens[mine])
            keys, values = (k, v) if index == 0 else (torch.where(trunks, x.detach(), x) for x in (k, v))
            parts.append(attend(self, one, q, keys, values))
        return torch.cat(parts)

    monkeypatch.setattr(PackedCoreAttention, "_attend", mistaken)
    report = measure(policy, baseline, [row])
    assert report.worst["gradient"][0] > MARGIN * TOLERANCES["gradient"]
    assert report.worst["logprob"][0] <= TOLERANCES["logprob"], "a mistake of the gradient alone"
