# SPDX-License-Identifier: Apache-2.0
"""One of two data-parallel ranks of ``test_vision_graphs.py``. Usage: DIRECTORY MODE...

Reports for each mode the errors against transformers, and the patches that this rank's tower encoded in generation, and
those that it encoded after it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from megatron_g2rpo.models.vision_cache import VisionCache
from megatron_g2rpo.models.vision_graphs import VisionGraphs
from megatron_g2rpo.policy import process_groups
from megatron_g2rpo.policy.device import init_process_group
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.policy.optimizer import gather_gradients
from tests.common.hardware import this_device
from tests.common.launch import report_result
from tests.common.parity import TEMPERATURE, toy_loss
from tests.common.policy_layout import layout_options
from tests.common.traps import Baseline, measure
from tests.common.vision_graphs import generate


def check(directory: Path, mode: str) -> dict[str, Any]:
    baseline = Baseline.load(directory)
    cache = VisionCache(10**6, frozen=False, graphs=VisionGraphs(10**9))
    policy = MegatronPolicy(
        layout_options(directory, mode=mode), this_device(), seed=0, max_steps=10, vision_cache=cache
    )
    forward: list[int] = []
    tower: Any = policy.model.vision_model
    tower.blocks[0].register_forward_pre_hook(lambda _, args: forward.append(len(args[0])))
    rows = baseline.rows(policy)
    generate(policy, rows)
    generated = sum(forward)

    def gathered(*arguments: Any) -> Any:
        """The gradients, complete on every rank, as ``measure`` reads them."""
        metrics = gradients(*arguments)
        gather_gradients(policy._ddp)  # type: ignore[arg-type]
        return metrics

    gradients, policy.gradients = policy.gradients, gathered  # type: ignore[method-assign]
    worst = measure(policy, baseline, rows).worst
    policy.update(rows, toy_loss, TEMPERATURE)
    return {"worst": worst, "generated": generated, "later": sum(forward) - generated}


def main() -> None:
    init_process_group(this_device())
    results = {}
    for mode in sys.argv[2:]:
        results[mode] = check(Path(sys.argv[1]), mode)
        process_groups.reset()
    report_result(results)


if __name__ == "__main__":
    main()
