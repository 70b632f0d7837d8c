# SPDX-License-Identifier: Apache-2.0
"""What ``megatron-g2rpo eval`` was asked for, and the recipe that this amounts to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from megatron_g2rpo import recipe as recipes
from megatron_g2rpo.commands.model_dir import with_local_model
from megatron_g2rpo.data.shard_index import ShardIndex
from megatron_g2rpo.models.directory import local_model_dir
from megatron_g2rpo.recipe import Recipe
from megatron_g2rpo.recipe.generation_section import Generation
from megatron_g2rpo.recipe.layers import EXEMPLARS, load_layers
from megatron_g2rpo.rollout.base import Sampling
from megatron_g2rpo.weights import SafetensorsDirectory

# Success, for pass@k, is at least this accuracy: a right answer in the formats that are right or wrong.
PASS_THRESHOLD = 1.0

# No policy is built: a recipe that spreads one over many GPUs can be evaluated on one.
_WHOLE = (
    "policy.megatron_cfg.tensor_model_parallel_size=1",
    "policy.megatron_cfg.pipeline_model_parallel_size=1",
    "policy.megatron_cfg.context_parallel_size=1",
    "policy.megatron_cfg.sequence_parallel=false",
    "policy.megatron_cfg.num_layers_in_first_pipeline_stage=null",
    "policy.megatron_cfg.num_layers_in_last_pipeline_stage=null",
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """The command line of ``eval``.

    Attributes:
        recipe: path of a recipe for `train` or `sft`; None for the exemplar, with ``model`` and ``data``.
        overrides: ``key=value`` each.
        model: Hugging Face directory, or a name on the hub, in the place of ``policy.model_name``.
        data: shards, in the place of ``data.validation``.
        out: the evaluation's directory; None for ``eval/<model>-<data>``.
        limit: largest number of samples of each task; None for all.
        samples: number of responses to each prompt.
        temperature: temperature of the sampling distribution; None for 0 (greedy) with one sample, and for the recipe's
            ``policy.generation.val_temperature`` with several.
        seed: seed of the sampling.
        pass_thresholds: the accuracies from which a response counts as a success, ``0.5`` or ``task=0.5`` each.
        compare: directory of an earlier evaluation to compare with.
        fresh: move an earlier evaluation in ``out`` aside.
    """

    recipe: Path | None = None
    overrides: tuple[str, ...] = ()
    model: str | None = None
    data: str | None = None
    out: Path | None = None
    limit: int | None = None
    samples: int = 1
    temperature: float | None = None
    seed: int = 0
    pass_thresholds: tuple[str, ...] = ()
    compare: Path | None = None
    fresh: bool = False

    def arguments(self) -> list[str]:
        """Return the command line that makes an equal request."""
        options = {
            "--model": self.model, "--data": self.data, "--out": self.out, "--limit": self.limit,
            "--samples": self.samples, "--temperature": self.temperature, "--seed": self.seed,
            "--compare": self.compare,
        }  # fmt: skip
        given = [f"{name}={value}" for name, value in options.items() if value is not None]
        given += [f"--pass-threshold={text}" for text in self.pass_thresholds]
        given += ["--fresh"] if self.fresh else []
        return ["eval", *given, *([] if self.recipe is None else [str(self.recipe)]), *self.overrides]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A request, completed.

    Attributes:
        recipe: the recipe; its ``policy.model_name`` is a directory.
        data: paths of the shards, of each dataset.
        out: the evaluation's directory.
        sampling: the distribution to sample from, and text that ends a response.
        thresholds: where a success begins.
    """

    recipe: Recipe
    data: tuple[str, ...]
    out: Path
    sampling: Sampling
    thresholds: Thresholds


@dataclass(frozen=True)
class Thresholds:
    """From which accuracy on a response counts as a success: of tasks by name, and of all others."""

    default: float = PASS_THRESHOLD
    by_task: Mapping[str, float] = field(default_factory=dict)

    def check(self, tasks: Sequence[str]) -> None:
        """Raise ``ValueError`` if a threshold is that of a task that the dataset lacks."""
        unknown = [task for task in self.by_task if task not in tasks]
        if unknown:
            raise ValueError(
                f"--pass-threshold {unknown[0]}=...: the dataset has no such task; it has {', '.join(tasks)}"
            )

    def of(self, task: str) -> float:
        """The threshold of a task."""
        return self.by_task.get(task, self.default)

    @classmethod
    def parsed(cls, texts: Sequence[str]) -> Thresholds:
        """Parse ``0.5`` or ``task=0.5`` each; the last one of a task counts.

        Raises:
            ValueError: a text is neither, or the number is not in (0, 1].
        """
        default, by_task = PASS_THRESHOLD, {}
        for text in texts:
            task, equals, number = text.rpartition("=")
            try:
                value = float(number)
            except ValueError:
                value = 0.0
            if not 0.0 < value <= 1.0 or (equals and not task):
                raise ValueError(f"--pass-threshold {text}: expected NUMBER or TASK=NUMBER, above 0 and at most 1")
            if task:
                by_task[task] = value
            else:
                default = value
        return cls(default, by_task)


def completed(request: Request, cluster: Sequence[str]) -> Settings:
    """Load the recipe that a request amounts to, with the model on this machine.

    Args:
        request: the request.
        cluster: overrides of the cluster's size.

    Raises:
        RecipeError: the recipe cannot be used.
        DataError: the dataset cannot be opened.
        FileNotFoundError: the model is neither a directory nor to be had from the hub.
        ValueError: the request contradicts itself.
    """
    if request.recipe is None and (request.model is None or request.data is None):
        raise ValueError("name a recipe to evaluate, or both a model and a dataset: --model HF_DIR --data DATA")
    if request.samples > 1 and request.temperature == 0.0:
        raise ValueError(
            f"--samples {request.samples} --temperature 0: greedy responses to a prompt are all the same; set "
            "--temperature above 0, or leave --samples out"
        )
    path = request.recipe if request.recipe is not None else EXEMPLARS / "vlm_g2rpo.yaml"
    model = None if request.model is None else str(local_model_dir(request.model))
    overrides = [
        *([] if request.recipe is not None else _of_exemplar(str(model))),
        *([] if request.data is None else _of_data(request.data)),
        *request.overrides,
        *([] if model is None else [f"policy.model_name={json.dumps(model)}"]),
        *_WHOLE,
        "cluster.num_nodes=1",
        *cluster,
    ]
    recipe = recipes.load(path, overrides, _kind(path, overrides))
    named = request.model or recipe.policy.model_name
    if model is None:
        _check_is_model(recipe)
    recipe = with_local_model(recipe)
    generation = recipe.policy.generation
    if generation.backend in ("vllm", "vllm_server") and request.samples > generation.batch_size:
        raise ValueError(
            f"--samples {request.samples}: vLLM decodes the responses to a prompt together, and "
            f"policy.generation.batch_size is {generation.batch_size}; raise it"
        )
    if recipe.data.validation is None:
        raise ValueError("the recipe has no data.validation; name the shards with --data")
    data = tuple(part.path for part in recipe.data.validation.parts)
    return Settings(
        recipe=recipe,
        data=data,
        out=request.out if request.out is not None else Path("eval") / "-".join(map(_name_of, (named, *data))),
        sampling=_sampling(request, generation),
        thresholds=Thresholds.parsed(request.pass_thresholds),
    )


def _sampling(request: Request, generation: Generation) -> Sampling:
    """How the recipe samples in validation; greedily for one response, unless a temperature is asked for."""
    validation = Sampling.of_validation(generation)
    temperature = request.temperature
    if temperature is None:
        return validation if request.samples > 1 else validation.greedily
    return validation.greedily if temperature == 0.0 else replace(validation, temperature=temperature)


def _of_exemplar(model: str) -> list[str]:
    """What the exemplar, which is made for training, has otherwise: weights are evaluated as they are."""
    dtypes = SafetensorsDirectory(model).dtypes
    return ["policy.precision=float32"] if dtypes == {torch.float32} else []


def _of_data(path: str) -> list[str]:
    """The dataset, and its tasks beside those that the recipe has."""
    tasks: dict[str, dict[str, str]] = {task: {} for task in ShardIndex(path).tasks}
    return [f"data.validation={json.dumps({'path': path})}", f"env.tasks={json.dumps(tasks)}"]


def _check_is_model(recipe: Recipe) -> None:
    """Refuse a recipe whose policy begins with other weights than those of ``policy.model_name``."""
    policy = recipe.policy
    if policy.pretrained_checkpoint is not None:
        raise ValueError(
            f"policy.pretrained_checkpoint: {policy.pretrained_checkpoint} is a Megatron checkpoint, and `eval` reads "
            "Hugging Face directories: write one with `megatron-g2rpo convert export`, and name it with --model"
        )
    if policy.init != "pretrained":
        raise ValueError(f"policy.init: {policy.init} has no weights to evaluate; name a model with --model")


def _kind(path: Path, overrides: Sequence[str]) -> Literal["train", "sft"]:
    tree = load_layers(path, overrides).tree
    return "sft" if "sft" in tree and "grpo" not in tree else "train"


def _name_of(path: str) -> str:
    """A short name of a model or a dataset: its last part; the run's, of a run's ``hf``."""
    parts = [part for part in Path(path).parts if part not in ("/", "..", "hf") and "*" not in part]
    return parts[-1].removesuffix(".tar") if parts else "model"
