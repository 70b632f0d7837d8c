# SPDX-License-Identifier: Apache-2.0
"""``megatron-g2rpo eval``: asks a model every prompt of a dataset and scores what it answers.

No policy is built: the engine is given the weights of the Hugging Face directory. Prompts go through in batches, which
all processes share, and what a batch gave is on the disk before the next one begins: a command that was interrupted
goes on there when it is given again. What is sampled for a prompt depends on neither batch nor process (see
``rollout.base.Engine.generate``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_g2rpo.collectives import from_first, gather
from megatron_g2rpo.commands.eval import answers_file, identity, show
from megatron_g2rpo.commands.eval.answers_file import ANSWERS, UNUSABLE, Record
from megatron_g2rpo.commands.eval.compare import compare, write_comparison
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
from megatron_g2rpo.recipe import Env, TrainRecipe
from megatron_g2rpo.tasks.scoring import read, score
from megatron_g2rpo.types import Prompt, Rollout

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
        RewardError: a reward cannot be computed.
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
    done = from_first(lambda: _prepare(request, settings, data), _TOLD)
    left = [entry for entry in entries if data.name(entry) not in done]
    if left:
        _ask(request, settings, data, left, Model.of(recipe, env, device), total=len(entries))
    from_first(lambda: _finish(request, settings), _TOLD)


def with_metrics(env: Env) -> Env:
    """The recipe's rewards, with accuracy and format computed also where the recipe does not weigh them."""
    missing = {name: 0.0 for name in ("accuracy", "format") if name not in env.reward_weights}
    # Behind the others, so that the sum of these rounds as it does in a run.
    return env.model_copy(update={"reward_weights": {**env.reward_weights, **missing}})


def _prepare(request: Request, settings: Settings, data: Mixture) -> set[str]:
    """Claim the evaluation's directory; the names of the samples that it is done with."""
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
    return answers_file.finished(settings.out, request.samples)


def _ask(
    request: Request, settings: Settings, data: Mixture, left: Sequence[Entry], model: Model, *, total: int
) -> None:
    """Ask all samples that are left, batch by batch, and write what comes. A collective of all ranks."""
    writes = dist.get_rank() == 0
    per_rank = max(1, _ENGINE_BATCHES * settings.recipe.policy.generation.batch_size // request.samples)
    size = dist.get_world_size() * per_rank
    with _progress(total, total - len(left), show=writes) as advance:
        for start in range(0, len(left), size):
            batch = left[start : start + size]
            answered, unusable = _ask_batch(request, settings, data, batch, model)
            if writes:
                answers_file.append(settings.out / UNUSABLE, unusable)
                answers_file.append(settings.out / ANSWERS, answered)
            advance(len(batch))


def _ask_batch(
    request: Request, settings: Settings, data: Mixture, batch: Sequence[Entry], model: Model
) -> tuple[list[Record], list[Record]]:
    """Ask samples, which the ranks share; the lines of all ranks, in the order of the batch. A collective.

    Returns:
        The lines of responses, and those of samples that could not be asked.
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
            unusable[place] = {
                "key": data.name(entry), "task": entry.task, "reason": error.reason, "message": str(error)
            }  # fmt: skip
    rollouts = model.answers(prompts, request.samples, sampling=settings.sampling, seed=request.seed, group_ids=places)
    shares = gather(lambda: (_records(rollouts, model), unusable))
    answers = {place: lines for share, _ in shares for place, lines in share.items()}
    refused = {place: record for _, share in shares for place, record in share.items()}
    return [line for place in sorted(answers) for line in answers[place]], [refused[place] for place in sorted(refused)]


def _records(rollouts: Sequence[Rollout], model: Model) -> dict[int, list[Record]]:
    """Score responses; group id -> the lines of its responses, in the order of the samples."""
    recipe, env = model.recipe, model.env
    default = recipe.data.response_format
    rewards = score(
        rollouts,
        env,
        response_format=default,
        max_response_tokens=recipe.policy.generation.max_new_tokens,
        overlong_buffer=recipe.grpo.overlong_penalty.buffer if isinstance(recipe, TrainRecipe) else None,
    )
    lines: dict[int, list[Record]] = {}
    for row, rollout in enumerate(rollouts):
        sample, response = rollout.prompt.sample, read(rollout, env, default)
        lines.setdefault(rollout.group_id, []).append(
            {
                "key": sample.key,
                "task": sample.task,
                "sample_index": rollout.sample_index,
                "question": sample.question,
                "reference": sample.answer,
                "answer_format": env.tasks[sample.task].answer_format or sample.answer_format,
                "answer": response.answer,
                "text": response.text,
                "thinking": response.thinking,
                "reward": float(rewards.total[row]),
                "parts": {name: float(part[row]) for name, part in rewards.parts.items()},
                "response_tokens": response.num_tokens,
                "truncated": response.truncated,
            }
        )
    return lines


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
