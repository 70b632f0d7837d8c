# SPDX-License-Identifier: Apache-2.0
"""Claim: an update makes the host wait for the device only where it must.

A GPU is kept busy by a host that runs ahead of it. Every ``item()``, ``tolist()``, mask or blocking copy between them
ends that, so each is counted here, by the line of ours that asks for it. One that is added must be worth its wait, and
is written down.
"""

from __future__ import annotations

from pathlib import Path

from megatron_g2rpo.policy.device import init_process_group, select
from megatron_g2rpo.policy.megatron import LossTerms, MegatronPolicy
from megatron_g2rpo.types import PackedBatch, TokenStats
from tests.common.parity import packer_for, random_sequences
from tests.common.policy_layout import policy_section
from tests.common.tiny_model import make_tiny_qwen3vl
from tests.gpu.devices import needs_virtual
from tests.gpu.virtual_cuda import counted_synchronisations

LOCAL = ("megatron_cfg.transformer_impl=local", "megatron_cfg.core_attention=local")


def _loss(batch: PackedBatch, stats: TokenStats) -> LossTerms:
    return LossTerms(loss=-(stats.logprobs * batch.loss_mask).sum(), num_tokens=batch.num_tokens, sums={})


@needs_virtual
def test_print(tmp_path: Path) -> None:
    config, _ = make_tiny_qwen3vl(tmp_path)
    device = select("gpu")
    init_process_group(device)
    policy = MegatronPolicy(policy_section(tmp_path, *LOCAL), device, seed=0, max_steps=10)
    batches = packer_for(config).pack(random_sequences(config), budget=80)
    policy.update(batches, _loss)
    for n in (1, len(batches)):
        with counted_synchronisations(within="megatron_g2rpo/policy") as counts:
            policy.update(batches[:n], _loss)
        print(n, [b.image_grid_thw is not None for b in batches])
        for k, v in sorted(counts.items()):
            print("   ", v, k)
