# SPDX-License-Identifier: Apache-2.0
"""Claim: an update makes the host wait for the device no more often than is written here.

A GPU is kept busy by a host that runs ahead of it. Every ``item()``, ``tolist()``, mask or blocking copy between them
ends that, so each is counted, by the file of ours that asks for it. One that is added must be worth its wait and raise
its number here; one that is saved lowers it.
"""

from __future__ import annotations

from collections import Counter
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
# Waits that each further micro-batch adds, with local layers, for a row of several sequences with images.
EACH_MICRO_BATCH = {
    "packed_row.py": 14,  # the bounds of sequences to the host, and places in the packed row to the device, both twice
    "logprobs.py": 4,  # which tokens are labelled
    "passes.py": 14,  # the row's tensors to the device one by one
    "loss_terms.py": 2,  # the token count there and back
    "model.py": 4,  # where the images' tokens are
    "vision.py": 7,  # pixels, grids and places of patches to the device one by one, grids back
}
# Waits of a whole update besides: losses, metrics, the norm of all gradients. Without Transformer Engine megatron-core
# clips and steps by torch's own operators, which read one number of every parameter twice.
EACH_UPDATE = 6
EACH_PARAMETER = 2


def _loss(batch: PackedBatch, stats: TokenStats) -> LossTerms:
    return LossTerms(loss=-(stats.logprobs * batch.loss_mask).sum(), num_tokens=batch.num_tokens, sums={})


def _waits(policy: MegatronPolicy, batches: list[PackedBatch]) -> Counter[str]:
    """Count the waits of an update by the file that asked for them."""
    with counted_synchronisations(within="megatron_g2rpo/policy") as counts:
        policy.update(batches, _loss)
    files: Counter[str] = Counter()
    for where, number in counts.items():
        files[where.split()[-1].split(":")[0]] += number
    return files


@needs_virtual
def test_an_update_waits_for_the_device_only_where_it_must(tmp_path: Path) -> None:
    config, _ = make_tiny_qwen3vl(tmp_path)
    device = select("gpu")
    init_process_group(device)
    policy = MegatronPolicy(policy_section(tmp_path, *LOCAL), device, seed=0, max_steps=10)
    batch = packer_for(config).pack(random_sequences(config), budget=80)[0]
    policy.update([batch], _loss)  # the first makes what later ones use
    one, two = _waits(policy, [batch]), _waits(policy, [batch, batch])
    more = two - one
    assert set(more) <= set(EACH_MICRO_BATCH), "a further file waits for the device"
    assert {file: number for file, number in more.items() if number > EACH_MICRO_BATCH[file]} == {}
    rest = (one - more).total()
    assert rest <= EACH_UPDATE + EACH_PARAMETER * len(list(policy.model.parameters()))
