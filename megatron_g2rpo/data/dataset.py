# SPDX-License-Identifier: Apache-2.0
"""Opening of a recipe's datasets, and the check that the recipe knows their tasks and answer formats."""

from __future__ import annotations

from pathlib import Path

from megatron_g2rpo import registry
from megatron_g2rpo.data.errors import DataError
from megatron_g2rpo.data.mixture import Mixture
from megatron_g2rpo.data.shard_index import ShardIndex
from megatron_g2rpo.recipe import Env
from megatron_g2rpo.recipe.data_section import DataSource


def open_datasets(source: DataSource, env: Env) -> Mixture:
    """Open the datasets that a recipe trains or validates on, as one.

    Args:
        source: ``data.train`` or ``data.validation``.
        env: the recipe's ``env`` section.

    Raises:
        DataError: see ``open_dataset`` and ``Mixture``.
    """
    return Mixture([open_dataset(each.path, env) for each in source.parts], [each.weight for each in source.parts])


def open_dataset(path: str, env: Env | None) -> ShardIndex:
    """Open the index of a dataset, and check its tasks and answer formats against a recipe.

    Args:
        path: a directory of shards, a glob of ``.tar`` files in one directory, or one ``.tar`` file.
        env: the recipe's ``env`` section; a task's own ``answer_format`` replaces those of its samples. None checks
            the dataset alone.

    Raises:
        DataError: the index or a shard cannot be used, the recipe does not list a task of the dataset, or an answer
            format is not registered.
    """
    try:
        index = ShardIndex(path, known_tasks=None if env is None else set(env.tasks))
    except DataError as error:
        if Path(path).is_absolute() or Path(path).exists():
            raise
        raise DataError(f"{error} (a relative path starts at the working directory, {Path.cwd()})") from error
    if env is None:
        return index
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
