# SPDX-License-Identifier: Apache-2.0
"""One rank of the objective's layout test: layouts, one after the other, against the oracle's gradients.

Usage: DIRECTORY LAYOUT..., a layout as tp,pp,cp,mode. The directory holds the model, and the oracle's results in
``oracle.pt``: objective -> (gradients, given log-probabilities).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from megatron_g2rpo.policy import process_groups
from megatron_g2rpo.policy.device import init_process_group
from megatron_g2rpo.policy.megatron import MegatronPolicy
from tests.common.compare import Report, largest_distance
from tests.common.hardware import this_device
from tests.common.launch import report_result
from tests.common.objective_parity import OBJECTIVES, gradients, loss_on, objective, with_fixed
from tests.common.parity import packer_for, parity_sequences, rows_of, sequences_by_rank
from tests.common.policy_layout import layout_options

# float32 sums in another order.
TOLERANCES = dict.fromkeys(OBJECTIVES, 1e-5)


def check(directory: Path, layout: str) -> Report:
    """The largest relative error of a gradient under each objective."""
    tp, pp, cp, mode = layout.split(",")
    options = layout_options(directory, tp=int(tp), pp=int(pp), cp=int(cp), mode=mode)
    policy = MegatronPolicy(options, this_device(), seed=0, max_steps=10)
    sequences = parity_sequences(policy.hf_config)
    packer = packer_for(policy.hf_config, policy.layout)
    by_rank = sequences_by_rank(len(sequences), policy.groups.data_size, idle=False)
    rows = rows_of(packer, sequences, by_rank, policy.groups.data_rank)
    report = Report(TOLERANCES)
    for name, (expected, fixed) in torch.load(directory / "oracle.pt", weights_only=False).items():
        recipe = objective(name)
        batches = [with_fixed(row, fixed, recipe) for row in rows]
        ours = gradients(policy, batches, loss_on(policy, batches, recipe))
        report.note(name, largest_distance(ours, expected), layout)
    return report


def main() -> None:
    init_process_group(this_device())
    results = {}
    for layout in sys.argv[2:]:
        results[layout] = check(Path(sys.argv[1]), layout).worst
        process_groups.reset()
    report_result(results)


if __name__ == "__main__":
    main()
