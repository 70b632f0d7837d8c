# SPDX-License-Identifier: Apache-2.0
"""Claim: in 80 columns (a terminal, a pipe, a job's log) a sweep is shown whole, and its overrides can be pasted."""

from __future__ import annotations

import shlex
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_g2rpo.commands import plan as command
from megatron_g2rpo.plan.sweep import Proposal

SERVERS = ", ".join(f'"http://server{number}:8000"' for number in range(16))
OVERRIDES = (
    "cluster.num_nodes=16",
    "policy.megatron_cfg.distributed_data_parallel_config.use_distributed_optimizer=true",
    f"policy.generation.vllm_server_cfg.addresses=[{SERVERS}]",
    "policy.generation.backend=vllm_server",
)


def proposal(world: int, gpus: int) -> Proposal:
    """The widest cells: as many GPUs in servers as are not in the trainer's world."""
    generation = SimpleNamespace(vllm_cfg=SimpleNamespace(tensor_parallel_size=1, gpu_memory_utilization=0.45))
    policy = SimpleNamespace(generation=generation, megatron_cfg=SimpleNamespace(recompute_granularity="selective"))
    plan = SimpleNamespace(
        layout=SimpleNamespace(tensor=1, pipeline=1, context=1),
        recipe=SimpleNamespace(policy=policy, world_size=world, data_parallel_size=128),
        worst=SimpleNamespace(peak=101.2e9),
    )
    speed = SimpleNamespace(step=1234.5, rate=12345.0, mfu=0.42, gpus=gpus, generation=1.0)
    return Proposal(OVERRIDES, cast(Any, plan), cast(Any, speed))


def test_nothing_is_cut_in_80_columns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(command, "_Planner", lambda *_: SimpleNamespace(recipe=None, check=lambda: None))
    monkeypatch.setattr(command, "sweep", lambda *_: [proposal(128, 256), proposal(256, 256)])
    machines = command.Machines(
        card="h100", gpu_memory_gb=None, mean_tokens=None, image_tokens=None, response_tokens=None
    )
    assert command.run_sweep(cast(Any, None), [], machines, 256, as_json=False)
    table, _, pasted = capsys.readouterr().out.partition(
        "The first as overrides (the names of the servers stand for yours):"
    )
    assert "…" not in table
    rows = [line.split() for line in table.splitlines() if "selective" in line]
    layout, end = ["1", "x", "1", "x", "1", "x", "128", "selective"], ["101.2", "1,234.5", "12,345", "42%"]
    assert rows == [[*layout, "servers:", "128", "x", "1", *end], [*layout, "vllm:", "TP", "1,", "0.45", *end]]
    assert shlex.split(pasted.replace("\\\n", "")) == list(OVERRIDES)
    assert len(pasted.strip().splitlines()) == len(OVERRIDES)
