# SPDX-License-Identifier: Apache-2.0
"""Opening of a recipe's dataset, and the check that the recipe knows its tasks and answer formats."""

from __future__ import annotations

from megatron_g2rpo import registry
from megatron_g2rpo.data.errors import DataError
from megatron_g2rpo.data.shard_index import ShardIndex
from megatron_g2rpo.recipe import Env


def open_dataset(path: str, env: Env) -> ShardIndex:
    """Open the index of a dataset, and check its tasks and answer formats against a recipe.

    Args:
        path: a directory of shards, a glob of ``.tar`` files in one directory, or one ``.tar`` file.
        env: the recipe's ``env`` section; a task's own ``answer_format`` replaces those of its samples.

    Raises:
        DataError: the index or a shard cannot be used, the recipe does not list a task of the dataset, or an answer
            format is not registered.
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
