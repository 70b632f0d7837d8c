# SPDX-License-Identifier: Apache-2.0
"""One rank of the test of exchanged prompts. Usage: DATASET MODEL [REPETITIONS].

With repetitions, drawing 8 prompts is timed without and with the exchange: seconds of the wall clock and of the CPU.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from megatron_g2rpo.data.errors import SampleError
from megatron_g2rpo.data.processing import ChatProcessor
from megatron_g2rpo.data.shard_index import ShardIndex
from megatron_g2rpo.data.stream import PromptStream
from megatron_g2rpo.policy.device import init_process_group
from megatron_g2rpo.train.step.metrics import skipped_metrics
from megatron_g2rpo.train.step.prompts import draw
from megatron_g2rpo.types import Prompt
from tests.common.hardware import this_device
from tests.common.launch import report_result

SIZE = 7


def same(mine: Prompt, whole: Prompt) -> bool:
    tensors = ("token_ids", "pixel_values", "image_grid_thw")
    fields = ("key", "task", "task_id", "response_prefix")
    return all(torch.equal(getattr(mine.inputs, name), getattr(whole.inputs, name)) for name in tensors) and all(
        getattr(mine, name) == getattr(whole, name) for name in fields
    )


def main(dataset: Path, model: Path, repetitions: int) -> None:
    init_process_group(this_device())
    world = dist.group.WORLD
    groups: Any = SimpleNamespace(model=world, model_rank=dist.get_rank(), model_size=dist.get_world_size())
    processor, index = ChatProcessor(model), ShardIndex(dataset)

    def stream(on_bad_sample: Any = "skip") -> PromptStream:
        return PromptStream(index, {}, 0, processor, on_bad_sample)

    if repetitions:
        times = []
        for exchanged in (False, True):
            prompts = stream()
            dist.barrier()
            start, cpu = time.perf_counter(), time.process_time()
            for _ in range(repetitions):
                draw(prompts, 8, range(8), groups) if exchanged else prompts.next_batch(8)
            times.append([(time.perf_counter() - start) / repetitions, (time.process_time() - cpu) / repetitions])
        report_result(times)
        return

    shared, alone = stream(), stream()
    equal = []
    for size in (SIZE, 1, 0, 30):  # more ranks than prompts, and none
        mine, whole = draw(shared, size, range(size), groups), alone.next_batch(size)
        equal.append(len(mine) == size and all(map(same, mine, whole)))
    owned = range(1, SIZE, 2)  # as the second of two replicas
    mine, whole = draw(shared, SIZE, owned, groups), alone.next_batch(SIZE, owned)
    equal.append(all(map(same, mine, whole)))
    try:
        draw(stream("error"), 60, range(60), groups)
        raised = ""
    except SampleError as error:
        raised = f"{error.reason}: {error}"
    report_result(
        {"equal": equal, "metrics": skipped_metrics(shared.skipped), "alone": alone.skipped, "raised": raised}
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
