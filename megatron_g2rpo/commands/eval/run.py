# SPDX-License-Identifier: Apache-2.0
"""``megatron-g2rpo eval``: asks a model every prompt of a dataset and scores what it answers.

No policy is built: the engine is given the weights of the Hugging Face directory. Prompts go through in batches, which
all processes share, and what a batch gave is on the disk before the next one begins: a command that was interrupted
goes on there when it is given again. What is sampled for a prompt depends on neither batch nor process (see
``rollout.base.Engine.generate``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from math import floor
from typing import NamedTuple

import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_g2rpo.collectives import from_first, gather
from megatron_g2rpo.commands.eval import answers_file, identity, show
from megatron_g2rpo.commands.eval.answers_file import ANSWERS, UNUSABLE, Record
from megatron_g2rpo.commands.eval.compare import compare, write_comparison
from megatron_g2rpo.commands.eval.lines import FAILED, WAY_ON, Lines, lines_of, scoring_of, too_many
from megatron_g2rpo.commands.eval.model import Model
from megatron_g2rpo.commands.eval.settings import Request, Settings
from megatron_g2rpo.commands.eval.summary import summarise, write_summary
from megatron_g2rpo.data.checks import prompt_fits, reference_is_readable, scored_formats
from megatron_g2rpo.data.dataset import open_datasets
from megatron_g2rpo.data.errors import SampleError
from megatron_g2rpo.data.mixture import Mixture
from megatron_g2rpo.data.shard_index import Entry
from megatron_g2rpo.data.stream import encode_entry, number_tasks
from megatron_g2rpo.policy.device import init_process_group, select, set_cpu_threads
from megatron_g2rpo.recipe import Env
from megatron_g2rpo.tasks.scoring import RewardError
from megatron_g2rpo.tasks.workers import RewardWorkers
from megatron_g2rpo.types import Prompt

# Batches are this many times what an engine decodes together, so that it seldom runs half empty.
_ENGINE_BATCHES = 2
# Columns of a table that goes to a file or a pipe: as many as it needs.
_FILE_WIDTH = 1000
# Told to all ranks when rank 0 prepares the directory.
_TOLD = (ValueError, OSError)


def evaluate(request: Request, settings: Settings) -> None:
    """Evaluate, from where an earlier call was interrupted; write the summary and print it. A collective of all ranks.

    Args:
        request: what was asked for.
        settings: the same, completed.

    Raises:
        EvaluationError: the directory holds something else.
        DataError: the dataset cannot be used, or no sample of it.
        ValueError: the engine cannot be built, or the weights do not fit it.
        RewardError: more rewards cannot be computed than ``env.max_failed_rewards`` allows, of the whole evaluation.
            The last batch is then not on file: the same command goes on with it.
        EngineUnavailable: the engine was lost; the same command goes on where it stopped.
    """
    recipe = settings.recipe
    device = select(recipe.cluster.device)
    if device.kind == "cpu":
        set_cpu_threads(recipe.cluster.gpus_per_node)
    init_process_group(device)
    env = with_metrics(recipe.env)
    assert recipe.data.validation is not None  # `completed` saw to it
    data = open_datasets(recipe.data.validation, env)
    entries = [entry for task in data.tasks for entry in data.first(task, request.limit or len(data))]
    before = from_first(lambda: _prepare(request, settings, data), _TOLD)
    left = [entry for entry in entries if data.name(entry) not in before.done]
    if left:
        with ExitStack() as stack:
            workers = RewardWorkers.of(env, recipe.imports)
            if workers is not None:
                stack.callback(workers.close)
                workers.start()  # while the weights are read
            model = Model.of(recipe, env, device, workers)
            _ask(request, settings, data, left, model, total=len(entries), failed=before.failed)
    from_first(lambda: _finish(request, settings), _TOLD)


def with_metrics(env: Env) -> Env:
    """The recipe's rewards, with accuracy and format computed also where the recipe does not weigh them."""
    missing = {name: 0.0 for name in ("accuracy", "format") if name not in env.reward_weights}
    # Behind the others, so that the sum of these rounds as it does in a run.
    return env.model_copy(update={"reward_weights": {**env.reward_weights, **missing}})


class _Before(NamedTuple):
    """What an earlier call of the same evaluation left.

    Attributes:
        done: the names of the samples that are on file.
        failed: number of their responses that have no reward.
    """

    done: set[str]
    failed: int


def _prepare(request: Request, settings: Settings, data: Mixture) -> _Before:
    """Claim the evaluation's directory, and say what is in it."""
    if request.compare is not None:
        identity.load(request.compare)  # before hours are spent
    settings.thresholds.check(data.tasks)
    sampling = {**asdict(settings.sampling), "samples": request.samples, "seed": request.seed}
    mine = identity.identity_of(
        settings.recipe, data=data.fingerprint, limit=request.limit, tasks=data.tasks, sampling=sampling
    )
    origin = {
        "model": settings.recipe.policy.model_name,
        "data": ", ".join(settings.data),
        "recipe": str(request.recipe) if request.recipe is not None else "the exemplar",
    }
    identity.claim(settings.out, mine, origin, fresh=request.fresh)
    done = answers_file.finished(settings.out, request.samples)
    return _Before(done, sum(line.get(FAILED, 0) for line in answers_file.read(settings.out / UNUSABLE)))


def _ask(
    request: Request,
    settings: Settings,
    data: Mixture,
    left: Sequence[Entry],
    model: Model,
    *,
    total: int,
    failed: int,
) -> None:
    """Ask all samples that are left, batch by batch, and write what comes. A collective of all ranks.

    Args:
        total: number of samples of the whole evaluation.
        failed: number of responses to the other samples that have no reward.
    """
    limit, responses = model.env.max_failed_rewards, total * request.samples
    writes = dist.get_rank() == 0
    per_rank = max(1, _ENGINE_BATCHES * settings.recipe.policy.generation.batch_size // request.samples)
    size = dist.get_world_size() * per_rank
    with _progress(total, total - len(left), show=writes) as advance:
        for start in range(0, len(left), size):
            batch = left[start : start + size]
            most = max(0, floor(limit * responses) - failed)
            try:
                lines = _ask_batch(request, settings, data, batch, model, most_failures=most)
            except RewardError as error:  # one rank has seen enough
                raise RewardError(
                    f"{failed} of {responses} rewards failed before, and now: {error}\n{WAY_ON}"
                ) from error
            if len(lines.failures) > most:
                raise RewardError(too_many(lines.failures, failed, responses, limit))
            failed += len(lines.failures)
            if writes:
                answers_file.append(settings.out / UNUSABLE, lines.unusable.values())
                answers_file.append(settings.out / ANSWERS, [line for each in lines.answered.values() for line in each])
            advance(len(batch))


def _ask_batch(
    request: Request,
    settings: Settings,
    data: Mixture,
    batch: Sequence[Entry],
    model: Model,
    *,
    most_failures: int,
) -> Lines:
    """Ask samples, which the ranks share; the lines of all ranks. A collective.

    Args:
        most_failures: number of responses without a reward above which none of this batch is needed.
    """
    task_ids = number_tasks(model.env.tasks)
    checks = [prompt_fits(model.recipe.policy), reference_is_readable(scored_formats(model.env))]
    prompts: list[Prompt] = []
    places: list[int] = []
    unusable: dict[int, Record] = {}
    for place in range(dist.get_rank(), len(batch), dist.get_world_size()):
        entry = batch[place]
        try:
            prompts.append(encode_entry(data, entry, model.processor, task_ids[entry.task], checks))
            places.append(place)
        except SampleError as error:
            line = {"key": data.name(entry), "task": entry.task, "reason": error.reason, "message": str(error)}
            unusable[place] = line
    scoring = scoring_of(model.recipe, model.env, model.workers)
    rollouts = model.answers(
        prompts,
        request.samples,
        sampling=settings.sampling,
        seed=request.seed,
        group_ids=places,
        on_finished=scoring.add,
    )

    def scored() -> Lines:
        rewards = scoring.rewards(rollouts, most_failures=most_failures)
        lines = lines_of(rollouts, rewards, model.env, model.recipe.data.response_format)
        return Lines.joined([lines, Lines({}, unusable)])

    return Lines.joined(gather(scored))


@contextmanager
def _progress(total: int, done: int, *, show: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar over prompts, or lines where nobody watches; yields the function that is told how many more."""
    console = Console(stderr=True, quiet=not show, highlight=False)
    if done:
        console.print(f"goes on: {done} of {total} prompts are on file")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True, console=console, disable=not show or not console.is_terminal) as progress:
        task = progress.add_task("prompts", total=total, completed=done)
        asked = done

        def advance(count: int) -> None:
            nonlocal asked
            asked += count
            progress.advance(task, count)
            if not console.is_terminal:
                console.print(f"{asked} of {total} prompts")

        yield advance


def _finish(request: Request, settings: Settings) -> None:
    """Summarise and compare what is on file, and print both; on one process."""
    summary = summarise(settings.out, settings.thresholds)
    write_summary(settings.out, summary)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    console.print(show.summary_table(summary, settings.out))
    if request.compare is not None:
        comparison = compare(request.compare, settings.out)
        write_comparison(settings.out, comparison)
        console.print(show.comparison_table(comparison))
