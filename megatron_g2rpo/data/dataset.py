# SPDX-License-Identifier: Apache-2.0
"""A recipe's dataset, opened: what it holds is known to the recipe before anything else is built."""

from __future__ import annotations

from megatron_g2rpo import registry
from megatron_g2rpo.data.errors import DataError
from megatron_g2rpo.data.shard_index import ShardIndex
from megatron_g2rpo.recipe import Env


def open_dataset(path: str, env: Env) -> ShardIndex:
    """The index of a dataset whose tasks the recipe lists, and whose answer formats are registered.

    Args:
        path: see ``ShardIndex``.
        env: the recipe's section; a task's own ``answer_format`` stands for those of its samples.

    Raises:
        DataError: see ``ShardIndex``; or a sample's answer format is not known.
    """
    index = ShardIndex(path, known_tasks=set(env.tasks))
    for task, names in index.answer_formats.items():
        if env.tasks[task].answer_format is not None:
            continue
        unknown = [name for name in names if name not in registry.answer_formats]
        if unknown:
            raise DataError(
                f"{index.directory}: samples of task {task!r}: {registry.answer_formats.unknown(unknown[0])}; register "
                f"it in a file of the recipe's imports, or set env.tasks.{task}.answer_format"
            )
    return index
