# SPDX-License-Identifier: Apache-2.0
"""The stream of training prompts: balanced over tasks, reproducible and resumable.

The prompt at position p of the stream is a function of the datasets, their weights, the task weights, the seed and p
alone. Every rank can therefore draw the same global batch without communication, and a run resumes from one integer.

- The task is the one that is furthest behind its share, so that every part of the stream has each task in proportion.
- Within a task whose datasets have different weights, the dataset is chosen in the same way.
- The sample: the k-th draw of a task (of a dataset of it) is entry k of an endless series of shuffles, one per epoch.
- A sample that cannot be used (``on_bad_sample: skip``) is replaced by another of its task and dataset that depends on
  p alone: a bad sample on one rank changes nothing on the others.
"""

from __future__ import annotations

import logging
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from megatron_g2rpo.data.checks import Check
from megatron_g2rpo.data.errors import DataError, SampleError
from megatron_g2rpo.data.mixture import Mixture
from megatron_g2rpo.data.processing import ChatProcessor
from megatron_g2rpo.data.shard_index import Entry, ShardIndex
from megatron_g2rpo.types import Prompt

OnBadSample = Literal["error", "skip"]
MAX_REPLACEMENTS = 32
SHOWN_SHARDS = 5
FINGERPRINT, SHARDS = "dataset fingerprint", "shards"

_logger = logging.getLogger(__name__)


class PromptStream:
    """An endless, task-balanced stream of prompts.

    Attributes:
        tasks: the tasks that are drawn, sorted.
        position: number of prompts drawn so far, over all ranks.
        skipped: reason (``SampleError.reason``) -> number of bad samples that this process has replaced since it
            started. Every sample is decoded by one process of the job, so that the sum over all is the job's.

    Args:
        data: the training shards.
        task_weights: task -> share, relative to the others; a task that is not named has 1, a task of weight 0 is never
            drawn.
        seed: seed of the shuffles.
        processor: processor that encodes samples.
        on_bad_sample: ``error`` raises on a sample that cannot be decoded, encoded or that a check refuses; ``skip``
            counts and replaces it.
        checks: what every prompt must hold, see ``data.checks``.
        task_ids: task -> ``Prompt.task_id``, for every task of the data; None numbers the data's own tasks in their
            sorted order.

    Raises:
        DataError: a weight names a task that the data lacks, a weight is negative, or no weight is above 0.
    """

    def __init__(
        self,
        data: ShardIndex | Mixture,
        task_weights: Mapping[str, float],
        seed: int,
        processor: ChatProcessor,
        on_bad_sample: OnBadSample = "error",
        *,
        checks: Sequence[Check] = (),
        task_ids: Mapping[str, int] | None = None,
    ) -> None:
        self._data, self._processor, self._seed = as_mixture(data), processor, seed
        self._task_ids = number_tasks(self._data.tasks) if task_ids is None else task_ids
        self._on_bad_sample, self._checks = on_bad_sample, tuple(checks)
        weights = complete_weights(self._data, task_weights)
        self.tasks = tuple(weights)
        self._shares = np.array(list(weights.values())) / sum(weights.values())
        self._sources = [self._data.sources(task) for task in self.tasks]
        self._source_shares = [np.array([source.share for source in sources]) for sources in self._sources]
        self.skipped: Counter[str] = Counter()
        self._named: set[str] = set()  # bad samples that the log has named
        self._shuffles: dict[tuple[int, int], tuple[int, np.ndarray]] = {}  # task, source -> (epoch, its permutation)
        self._rewind()

    def next_batch(self, n: int, indices: Sequence[int] | None = None) -> list[Prompt]:
        """Return the next n prompts of the stream.

        Args:
            n: number of prompts of the global batch; the position advances by n.
            indices: which of the n prompts, counted from 0, to decode and return, so that a rank pays for its own
                part only; None for all.

        Raises:
            SampleError: a sample cannot be used, under ``on_bad_sample: error``; the message names it.
            DataError: too many bad samples came in a row.
        """
        drawn = [self._draw() for _ in range(n)]
        first = self.position - n
        return [self._decode(*drawn[i], first + i) for i in (range(n) if indices is None else indices)]

    def named(self, keys: Sequence[str]) -> list[Prompt]:
        """Return the prompts of samples by their keys, wherever in the stream they come; the position stays.

        Raises:
            DataError: the data has no such sample.
            SampleError: a sample cannot be used.
        """
        entries = [self._data.find(key) for key in keys]
        return [encode_entry(self._data, entry, self._processor, self._task_ids[entry.task]) for entry in entries]

    def shortages(self, size: int) -> list[str]:
        """Return a line for the user if a step draws samples more than once, naming the tasks; else nothing.

        Args:
            size: prompts of a step, over all ranks.
        """
        short = []
        for task, share, sources in zip(self.tasks, self._shares, self._sources, strict=True):
            has, needs = sum(len(source.entries) for source in sources), math.ceil(float(share) * size - 1e-9)
            if has < needs:
                short.append(f"{task} has {has} for {needs}")
        if not short:
            return []
        return [f"the data holds fewer samples than a step's {size} prompts need, some repeat: {', '.join(short)}"]

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the stream and what it draws from, for a checkpoint; equal on every rank."""
        shards = [[shard.name, shard.sha256, shard.samples] for shard in self._data.contents()]
        return {"position": self.position, **self._identity(), FINGERPRINT: self._data.fingerprint, SHARDS: shards}

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Continue at the position of another stream over the same data, which may have been repaired.

        Returns:
            A line for the user if shards hold the same samples with another content; else nothing.

        Raises:
            DataError: the state belongs to another dataset, seed or mixture of tasks or datasets; the message names the
                difference.
        """
        for key, mine in self._identity().items():
            if state.get(key) != mine:
                raise DataError(
                    f"the saved position belongs to a stream with another {key} ({state.get(key)}, now {mine}); "
                    "start a new run, or restore the setting"
                )
        warnings = self._repaired(state)
        self._rewind()
        while self.position < state["position"]:
            self._advance()
        return warnings

    def _repaired(self, state: Mapping[str, Any]) -> list[str]:
        """Name the shards whose bytes alone have changed; raise if anything else has."""
        if state[FINGERPRINT] == self._data.fingerprint:
            return []
        # Releases up to 0.1 saved no shards.
        theirs = {name: (sha256, samples) for name, sha256, samples in state.get(SHARDS, ())}
        mine = {shard.name: (shard.sha256, shard.samples) for shard in self._data.contents()}
        why = ""
        if theirs:
            other = [name for name in mine if name in theirs and mine[name][1] != theirs[name][1]]
            differences = {
                "no longer there": [name for name in theirs if name not in mine],
                "new": [name for name in mine if name not in theirs],
                "with other samples": other,
            }
            why = "; ".join(f"{what}: {_some(names)}" for what, names in differences.items() if names)
            if not why and list(mine) == list(theirs):
                changed = [name for name in mine if mine[name] != theirs[name]]
                return [
                    f"the data changed since the checkpoint, in place: the run goes on with the samples of "
                    f"{_some(changed)} as they are now"
                ]
        raise DataError(
            f"the saved position belongs to a stream with another {FINGERPRINT} ({state[FINGERPRINT]}, now "
            f"{self._data.fingerprint}{'; shards ' + why if why else ''}); start a new run, or restore the data"
        )

    def _identity(self) -> dict[str, Any]:
        shares = {task: float(share) for task, share in zip(self.tasks, self._shares, strict=True)}
        weights = None if self._data.weights is None else list(self._data.weights)
        return {"seed": self._seed, "task shares": shares, "dataset weights": weights}

    def _rewind(self) -> None:
        self.position = 0
        self._counts = np.zeros(len(self.tasks), dtype=np.int64)  # draws per task before `position`
        self._source_counts = [np.zeros(len(sources), dtype=np.int64) for sources in self._sources]

    def _advance(self) -> tuple[int, int, int]:
        """Move to the next position.

        Returns:
            Task and source of this position, and how often the source was drawn before.
        """
        task = _furthest_behind(self._shares, self._counts, self.position)
        counts = self._source_counts[task]
        source = 0 if len(counts) == 1 else _furthest_behind(self._source_shares[task], counts, int(counts.sum()))
        before = int(counts[source])
        counts[source] += 1
        self._counts[task] += 1
        self.position += 1
        return task, source, before

    def _draw(self) -> tuple[Entry, Sequence[Entry]]:
        """Return the next sample, and those that may replace it."""
        task, source, before = self._advance()
        entries = self._sources[task][source].entries
        epoch, offset = divmod(before, len(entries))
        if self._shuffles.get((task, source), (None,))[0] != epoch:
            several = (2, source) if len(self._sources[task]) > 1 else ()
            generator = self._generator(self.tasks[task], epoch, *several)
            self._shuffles[task, source] = (epoch, generator.permutation(len(entries)))
        return entries[self._shuffles[task, source][1][offset]], entries

    def _decode(self, entry: Entry, others: Sequence[Entry], position: int) -> Prompt:
        replacements: np.random.Generator | None = None  # made for a bad sample alone: its seeding takes a while
        last: SampleError | None = None
        for _ in range(MAX_REPLACEMENTS):
            try:
                return encode_entry(self._data, entry, self._processor, self._task_ids[entry.task], self._checks)
            except SampleError as error:
                if self._on_bad_sample == "error":
                    raise
                last = error
                self.skipped[error.reason] += 1
                if entry.name not in self._named:  # once: small datasets draw it again and again
                    self._named.add(entry.name)
                    _logger.warning("skipped: %s", error)
                replacements = replacements or self._generator(entry.task, position, 1)
                entry = others[int(replacements.integers(len(others)))]
        raise DataError(
            f"task {entry.task!r}: {MAX_REPLACEMENTS} samples in a row cannot be used; the last one: {last}"
        ) from last

    def _generator(self, task: str, *numbers: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, zlib.crc32(task.encode()), *numbers])


def _furthest_behind(shares: np.ndarray, counts: np.ndarray, drawn: int) -> int:
    """The one whose count is furthest below its share of the draws, the next one included; the first of equals."""
    return int(np.argmax(shares * (drawn + 1) - counts))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN_SHARDS} more" if len(names) > SHOWN_SHARDS else ""
    return ", ".join(names[:SHOWN_SHARDS]) + more


def as_mixture(data: ShardIndex | Mixture) -> Mixture:
    """Return a dataset as a mixture of one."""
    return data if isinstance(data, Mixture) else Mixture([data])


def ignored(error: SampleError) -> None:
    """Do nothing with the error of a sample that is left out: it was logged."""


def number_tasks(tasks: Iterable[str]) -> dict[str, int]:
    """Task -> ``Prompt.task_id``, its place among the sorted names."""
    return {task: task_id for task_id, task in enumerate(sorted(tasks))}


def validation_prompts(
    data: ShardIndex | Mixture,
    per_task: int,
    processor: ChatProcessor,
    on_bad_sample: OnBadSample = "error",
    rows: slice = slice(None),
    task_ids: Mapping[str, int] | None = None,
    *,
    checks: Sequence[Check] = (),
    on_skipped: Callable[[SampleError], None] = ignored,
) -> list[Prompt]:
    """Return prompts of the first ``per_task`` samples of every task (all, where there are fewer), task by task.

    Args:
        data: the held-out shards; several datasets are taken from in turn, whatever their weights.
        per_task: largest number of samples of each task.
        processor: processor that encodes samples.
        on_bad_sample: ``skip`` leaves a bad sample out, without replacement, so that the selection does not depend on
            how samples are shared over ranks.
        rows: slice of these samples to decode and return, so that a rank pays for its own part only.
        task_ids: task -> ``Prompt.task_id``, see ``PromptStream``.
        checks: what every prompt must hold, see ``data.checks``.
        on_skipped: is given the error of every sample that is left out.

    Raises:
        SampleError: a sample cannot be used, under ``on_bad_sample: error``.
    """
    data = as_mixture(data)
    task_ids = number_tasks(data.tasks) if task_ids is None else task_ids
    prompts = []
    for entry in [entry for task in data.tasks for entry in data.first(task, per_task)][rows]:
        try:
            prompts.append(encode_entry(data, entry, processor, task_ids[entry.task], checks))
        except SampleError as error:
            if on_bad_sample == "error":
                raise
            _logger.warning("left out of validation: %s", error)
            on_skipped(error)
    return prompts


def encode_entry(
    data: Mixture, entry: Entry, processor: ChatProcessor, task_id: int, checks: Sequence[Check] = ()
) -> Prompt:
    """Read, decode and encode one sample, and check its prompt.

    Raises:
        SampleError: the sample cannot be decoded or encoded, or a check refuses it.
    """
    prompt = processor.encode_sample(data.read(entry), task_id)
    for check in checks:
        check(prompt)
    return prompt


def complete_weights(data: Mixture, task_weights: Mapping[str, float]) -> dict[str, float]:
    """Return task -> weight for all tasks with a weight above 0, sorted by task.

    Args:
        data: the training datasets.
        task_weights: as for ``PromptStream``.

    Raises:
        DataError: a weight names a task that the data lacks, is negative or not finite, or no weight is above 0.
    """
    for task, weight in task_weights.items():
        if task not in data.tasks:
            raise DataError(f"data.task_weights names {task!r}, which the data lacks; it has {', '.join(data.tasks)}")
        if not 0 <= weight < math.inf:
            raise DataError(f"data.task_weights.{task} is {weight}; a weight is 0 or more, and finite")
    weights = {task: float(task_weights.get(task, 1.0)) for task in data.tasks}
    weights = {task: weight for task, weight in weights.items() if weight > 0}
    if not weights:
        raise DataError("data.task_weights leaves no task to draw from")
    return weights
