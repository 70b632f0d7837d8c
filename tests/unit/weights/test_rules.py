# SPDX-License-Identifier: Apache-2.0
"""Claims: shard rules are exact both ways, lay rows out as megatron-core does, and copy no more than the shard."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_g2rpo.weights.rules import GateUp, GroupedQKV, Replicated, ShardRule, Split, Vocabulary


def qkv(groups: int) -> tuple[GroupedQKV, list[tuple[int, ...]]]:
    return GroupedQKV(heads=8, groups=groups, head_dim=4), [(32, 5), (4 * groups, 5), (4 * groups, 5)]


RULES: dict[str, tuple[ShardRule, list[tuple[int, ...]]]] = {
    "replicated": (Replicated(), [(5, 3)]),
    "column": (Split(0), [(8, 3)]),
    "row": (Split(1), [(3, 8)]),
    "vocabulary": (Vocabulary(13), [(13, 3)]),  # the last of eight ranks holds nothing but padding
    "gate_up": (GateUp(), [(8, 3), (8, 3)]),
    # With one group on four or eight ranks and with two on eight, ranks hold parts of groups, and of heads.
    **{f"qkv of {groups}": qkv(groups) for groups in (1, 2, 4)},
}


def random(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    return [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_merge_undoes_shard_exactly(name: str, size: int) -> None:
    rule, shapes = RULES[name]
    full = random(shapes)
    shards = [rule.shard(full, rank, size) for rank in range(size)]
    assert len({shard.shape for shard in shards}) == 1, "shards of one shape, or the all-gather fails"
    merged = rule.merge(shards)
    assert len(merged) == len(full)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(merged, full, strict=True))


def test_qkv_groups_are_interleaved() -> None:
    """Megatron's layout written out: [q0 q1 k0 v0 | q2 q3 k1 v1] for 4 query heads in 2 groups."""
    query, key, value = torch.arange(4)[:, None], torch.tensor([[10], [11]]), torch.tensor([[20], [21]])
    rule = GroupedQKV(heads=4, groups=2, head_dim=1)
    assert rule.shard([query, key, value], 0, 1).flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert rule.shard([query, key, value], 1, 2).flatten().tolist() == [2, 3, 11, 21]


def test_fewer_groups_than_ranks_cut_a_group() -> None:
    """Four ranks, two groups: the rows [q0 q1 k0 v0 | q2 q3 k1 v1] in four equal chunks."""
    query, key, value = torch.arange(4)[:, None], torch.tensor([[10], [11]]), torch.tensor([[20], [21]])
    rule = GroupedQKV(heads=4, groups=2, head_dim=1)
    chunks = [rule.shard([query, key, value], rank, 4).flatten().tolist() for rank in range(4)]
    assert chunks == [[0, 1], [10, 20], [2, 3], [11, 21]]


def test_vocabulary_padding_is_zero() -> None:
    (full,) = random([(13, 3)])
    assert torch.equal(Vocabulary(13).shard([full], 3, 4), torch.cat([full[12:], torch.zeros(3, 3)]))
    assert torch.equal(Vocabulary(13).shard([full], 7, 8), torch.zeros(2, 3))


class Written(TorchDispatchMode):
    """Counts the elements that operators write; views write none."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and isinstance(out, Tensor):
            self.elements += out.numel()
        return out


@pytest.mark.parametrize("name", RULES)
def test_sharding_copies_no_more_than_the_shard(name: str) -> None:
    """Rules that joined full tensors first would read all of a mapped checkpoint on every rank."""
    rule, shapes = RULES[name]
    full = random(shapes)
    with Written() as written:
        shard = rule.shard(full, 1, 4)  # no padding on this rank
    assert written.elements <= shard.numel()
