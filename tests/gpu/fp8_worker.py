# SPDX-License-Identifier: Apache-2.0
"""Worker of ``test_fp8_ranks``: scales of two ranks after one pass with gradient, in several layouts.

Usage: torchrun --nproc-per-node 2 -m tests.gpu.fp8_worker DIRECTORY
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from megatron.core import parallel_state

from megatron_g2rpo.policy.device import Device, init_process_group, select
from tests.common.launch import report_result
from tests.common.parity import TEMPERATURE, toy_loss
from tests.gpu.fp8_policy import fp8_policy, rows, scales, sequences

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp": {"tp": 2},
    "tp-sp": {"tp": 2, "sequence_parallel": True},
    "cp": {"cp": 2},
    "pp": {"pp": 2},
    "dp": {},
}


@contextmanager
def no_reduction() -> Iterator[None]:
    """Leave out the maximum over ranks of what delayed scaling has seen."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    nothing = staticmethod(lambda tensor, group: None)
    with patch.object(FP8GlobalStateManager, "reduce_tensor_across_group_op_max", nothing):
        yield


def scales_of(directory: Path, device: Device, **layout: Any) -> dict[str, list[float]]:
    """Return the delayed scales of a policy after one pass over a row; data-parallel ranks have rows of their own."""
    policy = fp8_policy(directory, device, "delayed", "hybrid", **layout)
    batches = rows(policy, sequences(policy.hf_config))
    policy.gradients(batches[policy.groups.data_rank :][:1], toy_loss, TEMPERATURE)
    return scales(policy)


def main() -> None:
    directory = Path(sys.argv[1])
    device = select("gpu")
    init_process_group(device)
    found = {}
    for name, layout in LAYOUTS.items():
        found[name] = scales_of(directory, device, **layout)
        with no_reduction():
            found[f"{name} without reduction"] = scales_of(directory, device, **layout)
        parallel_state.destroy_model_parallel()
    report_result(found)


if __name__ == "__main__":
    main()
