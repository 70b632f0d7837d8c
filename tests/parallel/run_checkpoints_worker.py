# SPDX-License-Identifier: Apache-2.0
"""One of two tensor-parallel ranks that save asynchronously, resume, fail to write, end, and refuse what is not finite.

Usage: DIRECTORY, which holds `model`; checkpoints go to `run`.
"""

from __future__ import annotations

import errno
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_g2rpo.policy.device import init_process_group
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.train.run import checkpoint_writing
from megatron_g2rpo.train.run.checkpoints import Checkpoints
from megatron_g2rpo.train.run.retention import Retention
from megatron_g2rpo.train.run.signals import StopRequest
from megatron_g2rpo.train.run.stopping import Stopping
from tests.common.hardware import this_device
from tests.common.launch import report_result
from tests.common.policy_layout import layout_options
from tests.unit.train.run.checkpoint_cases import Notes, make_run

METRIC = "val/mean_reward"


def full(**_: Any) -> None:
    raise OSError(errno.ENOSPC, "")


def make_policy(root: Path) -> MegatronPolicy:
    return MegatronPolicy(layout_options(root / "model", tp=2), this_device(), seed=0, max_steps=10)


def main(root: Path) -> None:
    init_process_group(this_device())
    policy = make_policy(root)
    directory, best_one = root / "run", Retention(1, METRIC)

    def names() -> list[str]:
        dist.barrier()
        return sorted(path.name for path in directory.iterdir())

    first = Checkpoints(directory, best_one, run_id="mine", is_async=True)
    for step, reward in ((1, 0.9), (2, 0.1), (3, 0.2)):
        first.poll()
        first.save(step, policy, {"position": step}, {METRIC: reward})
    first.finish()
    said: dict[str, Any] = {"async": names()}

    later = Checkpoints(directory, best_one, run_id="mine")
    found = later.newest_whole()
    assert found.step is not None
    said["found"] = [found.step, dict(found.metrics or {}), later.load(found.step, policy)]
    later.save(4, policy, {}, {METRIC: 0.3})
    said["later"] = names()

    write = checkpoint_writing._write_bucket
    if dist.get_rank() == 1:
        checkpoint_writing._write_bucket = full
    try:
        first.save(5, policy, {})
        first.finish()
    except checkpoint_writing.CheckpointWriteError as error:
        said["full"] = str(error)
    checkpoint_writing._write_bucket = write
    said["after full"] = names()

    if dist.get_rank() == 1:
        name = next(name for name, _ in policy.model.named_parameters() if name.endswith("linear_proj.weight"))
        dict(policy.model.named_parameters())[name].data[0, 0] = math.nan
    try:
        later.save(6, policy, {})
    except FloatingPointError as error:
        said["nan"] = str(error)
    said["after nan"] = names()
    said["ended"] = ended(root / "ended", make_policy(root))
    report_result(said)


def ended(directory: Path, policy: MegatronPolicy) -> list[Any]:
    """What an asynchronous run leaves that ends while rank 1 still writes: by an error of both ranks, or of rank 1."""

    def slow(**keywords: Any) -> None:
        time.sleep(1.0)
        write(**keywords)

    write = checkpoint_writing._write_bucket
    if dist.get_rank() == 1:
        checkpoint_writing._write_bucket = slow
    keys = "checkpointing.async_save=true", "checkpointing.keep_top_k=null"
    run, guard = make_run(directory, policy, Stopping(None, StopRequest(), {}), *keys)
    left: list[Any] = []
    for step in (1, 2):
        try:
            with run.naming_checkpoints(Notes().log):
                run.save(step)
                if step == 1:
                    guard.skips(1.0, math.nan)
                    guard.settle(2, 0, list, group=policy.groups.data, note=print)
                elif dist.get_rank() == 1:
                    raise OSError("of this rank alone")
        except (FloatingPointError, OSError):
            pass
        dist.barrier()
        left.append(sorted(path.name for path in (directory / "checkpoints").iterdir()))
        dist.barrier()
    run._checkpoints.finish()
    return left


if __name__ == "__main__":
    main(Path(sys.argv[1]))
