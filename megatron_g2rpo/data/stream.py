# SPDX-License-Identifier: Apache-2.0
"""The stream of training prompts: balanced over tasks, reproducible and resumable.

The prompt at position p of the stream is a function of the dataset, the task weights, the seed and p alone. Every rank
can therefore draw the same global batch without communication, and a run resumes from one integer.

- The task is the one that is furthest behind its share, so that every part of the stream has each task in proportion.
- The sample: the k-th draw of a task is entry k of an endless series of shuffles, one per epoch of the task.
- A sample that cannot be decoded (``on_bad_sample: skip``) is replaced by another of its task that depends on p alone:
  an undecodable sample on one rank changes nothing on the others.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np

from megatron_g2rpo.data.errors import DataError, SampleError
from megatron_g2rpo.data.processing import ChatProcessor
from megatron_g2rpo.data.shard_index import Entry, ShardIndex
from megatron_g2rpo.types import Prompt

OnBadSample = Literal["error", "skip"]
MAX_REPLACEMENTS = 32

_logger = logging.getLogger(__name__)


class PromptStream:
    """An endless, task-balanced stream of prompts.

    Attributes:
        tasks: the tasks that are drawn, sorted.
        position: number of prompts drawn so far, over all ranks.
        num_skipped: number of undecodable samples that this process has replaced since it started.

    Args:
        index: index of the training shards.
        task_weights: task -> share, relative to the others; a task that is not named has 1, a task of weight 0 is never
            drawn.
        seed: seed of the shuffles.
        processor: processor that encodes samples.
        on_bad_sample: ``error`` raises on an undecodable sample, ``skip`` counts and replaces it.
        need_response: every sample must have a ``response`` (supervised training).
        task_ids: task -> ``Prompt.task_id``, for every task of the data; None numbers the data's own tasks in their
            sorted order.

    Raises:
        DataError: a weight names a task that the data lacks, a weight is negative, or no weight is above 0.
    """

    def __init__(
        self,
        index: ShardIndex,
        task_weights: Mapping[str, float],
        seed: int,
        processor: ChatProcessor,
        on_bad_sample: OnBadSample = "error",
        *,
        need_response: bool = False,
        task_ids: Mapping[str, int] | None = None,
    ) -> None:
        self._index, self._processor, self._seed = index, processor, seed
        self._task_ids = number_tasks(index.tasks) if task_ids is None else task_ids
        self._on_bad_sample, self._need_response = on_bad_sample, need_response
        weights = _complete_weights(index, task_weights)
        self.tasks = tuple(weights)
        self._shares = np.array(list(weights.values())) / sum(weights.values())
        self.position = 0
        self.num_skipped = 0
        self._counts = np.zeros(len(self.tasks), dtype=np.int64)  # draws per task before `position`
        self._shuffles: dict[str, tuple[int, np.ndarray]] = {}  # task -> (epoch, its permutation)

    def next_batch(self, n: int, indices: range | None = None) -> list[Prompt]:
        """Return the next n prompts of the stream.

        Args:
            n: number of prompts of the global batch; the position advances by n.
            indices: which of the n prompts, counted from 0, to decode and return, so that a rank pays for its own
                part only; None for all.

        Raises:
            SampleError: a sample cannot be decoded or encoded, under ``on_bad_sample: error``; the message names it.
            DataError: a sample lacks a response where one is needed, or too many bad samples came in a row.
        """
        drawn = [self._draw() for _ in range(n)]
        first = self.position - n
        return [self._decode(drawn[i], first + i) for i in (range(n) if indices is None else indices)]

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the stream and what it draws from, for a checkpoint; equal on every rank."""
        return {"position": self.position, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at the position of another stream over the same data.

        Raises:
            DataError: the state belongs to another dataset, seed or mixture of tasks; the message names the difference.
        """
        for key, mine in self._identity().items():
            if state[key] != mine:
                raise DataError(
                    f"the saved position belongs to a stream with another {key} ({state[key]}, now {mine}); "
                    "start a new run, or restore the setting"
                )
        self.position, self._counts = 0, np.zeros_like(self._counts)
        while self.position < state["position"]:
            self._advance()

    def _identity(self) -> dict[str, Any]:
        shares = {task: float(share) for task, share in zip(self.tasks, self._shares, strict=True)}
        return {"seed": self._seed, "task shares": shares, "dataset fingerprint": self._index.fingerprint}

    def _advance(self) -> tuple[int, int]:
        """Return the task of this position and how often it was drawn before, and move to the next position."""
        lag = self._shares * (self.position + 1) - self._counts
        task = int(np.argmax(lag))  # the first of equals: tasks are sorted
        before = int(self._counts[task])
        self._counts[task] += 1
        self.position += 1
        return task, before

    def _draw(self) -> Entry:
        number, before = self._advance()
        task = self.tasks[number]
        entries = self._index.entries(task)
        epoch, offset = divmod(before, len(entries))
        if self._shuffles.get(task, (None,))[0] != epoch:
            self._shuffles[task] = (epoch, self._generator(task, epoch).permutation(len(entries)))
        return entries[self._shuffles[task][1][offset]]

    def _decode(self, entry: Entry, position: int) -> Prompt:
        replacements = self._generator(entry.task, position, 1)
        for _ in range(MAX_REPLACEMENTS):
            try:
                task_id = self._task_ids[entry.task]
                return encode_entry(self._index, entry, self._processor, task_id, self._need_response)
            except SampleError as error:
                if self._on_bad_sample == "error":
                    raise
                self.num_skipped += 1
                _logger.warning("skipped: %s", error)
                entries = self._index.entries(entry.task)
                entry = entries[int(replacements.integers(len(entries)))]
        raise DataError(
            f"task {entry.task!r}: {MAX_REPLACEMENTS} undecodable samples in a row, the last one {entry.name}; "
            "repair the shards"
        )

    def _generator(self, task: str, *numbers: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, zlib.crc32(task.encode()), *numbers])


def number_tasks(tasks: Iterable[str]) -> dict[str, int]:
    """Task -> ``Prompt.task_id``, its place among the sorted names."""
    return {task: task_id for task_id, task in enumerate(sorted(tasks))}


def validation_prompts(
    index: ShardIndex,
    per_task: int,
    processor: ChatProcessor,
    on_bad_sample: OnBadSample = "error",
    rows: slice = slice(None),
    task_ids: Mapping[str, int] | None = None,
) -> list[Prompt]:
    """Return prompts of the first ``per_task`` samples of every task (all, where there are fewer), task by task.

    Args:
        index: index of the held-out shards.
        per_task: largest number of samples of each task.
        processor: processor that encodes samples.
        on_bad_sample: ``skip`` leaves an undecodable sample out, without replacement, so that the selection does not
            depend on how samples are shared over ranks.
        rows: slice of these samples to decode and return, so that a rank pays for its own part only.
        task_ids: task -> ``Prompt.task_id``, see ``PromptStream``.

    Raises:
        SampleError: a sample cannot be decoded or encoded, under ``on_bad_sample: error``.
    """
    task_ids = number_tasks(index.tasks) if task_ids is None else task_ids
    prompts = []
    for entry in [entry for task in index.tasks for entry in index.entries(task)[:per_task]][rows]:
        try:
            prompts.append(encode_entry(index, entry, processor, task_ids[entry.task]))
        except SampleError as error:
            if on_bad_sample == "error":
                raise
            _logger.warning("left out of validation: %s", error)
    return prompts


def encode_entry(
    index: ShardIndex, entry: Entry, processor: ChatProcessor, task_id: int, need_response: bool = False
) -> Prompt:
    """Read, decode and encode one sample.

    Raises:
        SampleError: the sample cannot be decoded or encoded.
        DataError: the sample lacks a response where one is needed.
    """
    sample = index.read(entry)
    if need_response and sample.response is None:
        raise DataError(f"sample {sample.key} has no response; supervised training needs one in every sample")
    return processor.encode_sample(sample, task_id)


def _complete_weights(index: ShardIndex, task_weights: Mapping[str, float]) -> dict[str, float]:
    """Check the weights, and return task -> weight for all tasks with a weight above 0, sorted by task."""
    for task, weight in task_weights.items():
        if task not in index.tasks:
            raise DataError(f"data.task_weights names {task!r}, which the data lacks; it has {', '.join(index.tasks)}")
        if not weight >= 0:
            raise DataError(f"data.task_weights.{task} is {weight}; a weight is 0 or more")
    weights = {task: float(task_weights.get(task, 1.0)) for task in index.tasks}
    weights = {task: weight for task, weight in weights.items() if weight > 0}
    if not weights:
        raise DataError("data.task_weights leaves no task to draw from")
    return weights
