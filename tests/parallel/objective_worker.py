# SPDX-License-Identifier: Apache-2.0
"""One rank of the objective's layout test: layouts, one after the other, against the oracle's gradients.

Usage: DIRECTORY LAYOUT..., a layout as tp,pp,cp,mode. The directory holds the model, and the oracle's results in
``oracle.pt``: objective -> (gradients, given log-probabilities).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_g2rpo.policy import process_groups
from megatron_g2rpo.policy.device import init_process_group, select
from megatron_g2rpo.policy.megatron import MegatronPolicy
from tests.common.objective_parity import distance, gradients, loss_on, objective, with_fixed
from tests.common.parity import deal, packer_for, parity_sequences, rows_of
from tests.common.policy_layout import layout_options

# float32 sums in another order.
TOLERANCE = 1e-5


def check(directory: Path, layout: str) -> None:
    tp, pp, cp, mode = layout.split(",")
    options = layout_options(directory, tp=int(tp), pp=int(pp), cp=int(cp), mode=mode)
    policy = MegatronPolicy(options, select("cpu"), seed=0, max_steps=10)
    sequences = parity_sequences(policy.hf_config)
    packer = packer_for(policy.hf_config, policy.layout)
    hands = deal(len(sequences), policy.groups.data_size, idle=False)
    rows = rows_of(packer, sequences, hands, policy.groups.data_rank)
    for name, (expected, fixed) in torch.load(directory / "oracle.pt", weights_only=False).items():
        recipe = objective(name)
        batches = [with_fixed(row, fixed, recipe) for row in rows]
        error = distance(gradients(policy, batches, loss_on(policy, batches, recipe)), expected)
        assert error <= TOLERANCE, f"{layout}, {name}: {error:.1e}"
        if dist.get_rank() == 0:
            print(f"objective ok [{layout}] [{name}] {error:.1e}", flush=True)


def main() -> None:
    init_process_group(select("cpu"))
    for layout in sys.argv[2:]:
        check(Path(sys.argv[1]), layout)
        process_groups.reset()


if __name__ == "__main__":
    main()
