# SPDX-License-Identifier: Apache-2.0
"""The model that is evaluated: a rollout engine with the weights of a Hugging Face directory. No policy is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_g2rpo import models
from megatron_g2rpo.data.processing import ChatProcessor
from megatron_g2rpo.models.directory import load_config
from megatron_g2rpo.policy.device import Device
from megatron_g2rpo.recipe import Env, Policy, Recipe
from megatron_g2rpo.rollout.base import Engine, OnFinished, Sampling
from megatron_g2rpo.tasks import response_formats
from megatron_g2rpo.tasks.workers import RewardWorkers
from megatron_g2rpo.train.assembly import engine_for
from megatron_g2rpo.train.step.generation import answers
from megatron_g2rpo.types import DTYPES, Prompt, Rollout
from megatron_g2rpo.weights import SafetensorsDirectory, WeightSource
from megatron_g2rpo.weights.soundness import flaw, refuse_flaws


@dataclass(frozen=True)
class Model:
    """A model that answers prompts.

    Attributes:
        recipe: the recipe; its ``policy.model_name`` is a directory.
        env: the tasks, and how their responses are rewarded.
        processor: makes prompts of samples.
        engine: answers them.
        weights: the engine's weights, should it lose them.
        workers: processes that reward parts run in; None: this process.
    """

    recipe: Recipe
    env: Env
    processor: ChatProcessor
    engine: Engine
    weights: DirectoryWeights
    workers: RewardWorkers | None

    @classmethod
    def of(cls, recipe: Recipe, env: Env, device: Device, workers: RewardWorkers | None) -> Model:
        """Build the engine that the recipe names, and load its weights. A collective of all ranks.

        Raises:
            DataError: the directory lacks something that prompts are made with, see ``ChatProcessor``.
            ValueError: the engine cannot be built, or the weights do not fit it.
        """
        data, directory = recipe.data, recipe.policy.model_name
        processor = ChatProcessor(
            directory,
            data.min_pixels,
            data.max_pixels,
            data.system_prompt,
            response_formats.by_task(env, data.response_format) if data.format_instruction else None,
        )
        banned = processor.banned_token_ids(processor.vocab_size)
        engine = engine_for(recipe.policy, processor, device, banned)
        weights = DirectoryWeights(recipe.policy, device)
        engine.load_weights(weights.source())
        return cls(recipe, env, processor, engine, weights, workers)

    def answers(
        self,
        prompts: Sequence[Prompt],
        n: int,
        *,
        sampling: Sampling,
        seed: int,
        group_ids: Sequence[int],
        on_finished: OnFinished,
    ) -> list[Rollout]:
        """Return ``n`` responses to each of this rank's prompts; see ``Engine.generate``. A collective of all ranks."""
        return answers(
            self.engine,
            self.weights,
            prompts,
            n,
            sampling=sampling,
            seed=seed,
            group_ids=group_ids,
            on_finished=on_finished,
        )


class DirectoryWeights:
    """The weights of a Hugging Face directory, as an engine takes them; values that are not finite are refused.

    Args:
        policy: the recipe's section; ``model_name`` is the directory, ``precision`` the dtype of what is streamed.
        device: where an engine wants the tensors.
    """

    def __init__(self, policy: Policy, device: Device) -> None:
        self._tensors = SafetensorsDirectory(policy.model_name)
        self._device, self._dtype = device.torch_device, DTYPES[policy.precision]
        config = load_config(policy.model_name)
        ignored = models.family(config.model_type).weights(config).ignored
        self._names = [name for name in self._tensors if name not in ignored]

    def source(self) -> WeightSource:
        """Return the weights; each tensor is read when it is asked for."""
        return WeightSource(
            specs=lambda: {name: self._tensors[name].to("meta", self._dtype) for name in self._names},
            tensors=lambda: ((name, self._finite(name).to(self._device, self._dtype)) for name in self._names),
        )

    def _finite(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        what = flaw(tensor, self._dtype)
        refuse_flaws([f"{name} {what}"] if what else [], self._tensors.file_of(name))
        return tensor
