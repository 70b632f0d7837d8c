# SPDX-License-Identifier: Apache-2.0
"""The ``policy`` section of a test's policy, with any layout."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.common.parity import policy_options

# The keys of distributed_data_parallel_config that each mode of data parallelism turns on.
DATA_PARALLELISM: dict[str, tuple[str, ...]] = {
    "plain": (),
    "overlap": ("overlap_grad_reduce",),
    "distributed": ("use_distributed_optimizer",),
    "distributed-overlap": ("use_distributed_optimizer", "overlap_grad_reduce"),
    "distributed-overlap-gather": ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather"),
}


def layout_options(
    directory: Path | str,
    *,
    tp: int = 1,
    pp: int = 1,
    cp: int = 1,
    mode: str = "plain",
    precision: str = "float32",
    lr: float = 1e-3,
    **megatron: Any,
) -> SimpleNamespace:
    """Options of ``MegatronPolicy``.

    Args:
        tp, pp, cp: parallel sizes.
        mode: of data parallelism, a key of ``DATA_PARALLELISM``.
        megatron: further keys of ``megatron_cfg``.
    """
    modes = {key: key in DATA_PARALLELISM[mode] for key in DATA_PARALLELISM["distributed-overlap-gather"]}
    sizes = {"tensor": tp, "pipeline": pp, "context": cp}
    return policy_options(directory, **sizes, lr=lr, precision=precision, megatron=megatron, ddp=modes)
