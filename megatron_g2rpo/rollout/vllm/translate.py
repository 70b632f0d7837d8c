# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# (vLLM has an environment of its own; tests/vllm/contract holds what is used of it.)
"""Translation of prompts to vLLM's requests and of its answers to rollouts, for vLLM in the process and on servers.

vLLM gets token ids and the pixels that the trainer itself will read, not images: nothing is tokenised, resized or
normalised a second time, so engine and trainer can differ in arithmetic alone. That takes ``ENGINE_ARGUMENTS``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.feature_extraction_utils import BatchFeature
from vllm import SamplingParams
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind

from megatron_g2rpo.models.images import images_of
from megatron_g2rpo.recipe import Policy
from megatron_g2rpo.rollout import base
from megatron_g2rpo.rollout.stop_strings import read_response
from megatron_g2rpo.types import Prompt, Rollout

# What every engine of ours must be started with: log-probabilities of the distribution that was sampled from, at its
# temperature and without banned tokens; pixels taken as they come.
ENGINE_ARGUMENTS = {"logprobs_mode": "processed_logprobs", "mm_device_do_normalize": False, "generation_config": "vllm"}
# What a request over HTTP says of its sampling parameters; the server sets how its output comes by itself.
PARAMETERS = (
    *("n", "temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "logprobs", "logit_bias"),
    *("stop", "stop_token_ids", "ignore_eos", "detokenize"),
)
# Added to the logit of a banned token. Finite, because JSON has no infinity.
_NEVER = -1e30
# The lowest log-probability of a token that filters keep; vLLM's API sends one below it for minus infinity, and that of
# a banned token is lower still.
_LEAST = -9000.0
# Tokens beyond ``top_k`` that vLLM is asked for: it keeps those that tie with the last, in bfloat16 often some.
_TIES = 32
_DEFAULT_MAX_LOGPROBS = 20  # of vllm.EngineArgs
# Largest distance from 1 of the probabilities of the tokens that vLLM says it kept; float32 sums are far below it.
_MASS = 1e-3


def num_logprobs(top_k: int | None) -> int:
    """Return how many log-probabilities of each place a request asks for, so that what ``top_k`` keeps is among them.

    Without ``top_k`` that is none but the sampled token's, which always comes.
    """
    return 0 if top_k is None else top_k + _TIES


def engine_arguments(policy: Policy, dtype: str) -> dict[str, Any]:
    """Return the arguments of a vLLM engine that a recipe asks for, under the names of ``vllm.EngineArgs``."""
    generation = policy.generation
    options = generation.vllm_cfg
    return {
        "model": policy.model_name,
        "dtype": dtype,
        "max_model_len": policy.max_total_sequence_length,
        "max_num_seqs": generation.batch_size,
        # The samples of a group share their prompt's keys and values; so do the two ways of validation.
        "enable_prefix_caching": True,
        "tensor_parallel_size": options.tensor_parallel_size,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "kv_cache_memory_bytes": options.kv_cache_memory_bytes,
        "enforce_eager": options.enforce_eager,
        "limit_mm_per_prompt": {"image": options.images_per_prompt, "video": 0},
        "max_logprobs": max(_DEFAULT_MAX_LOGPROBS, num_logprobs(generation.top_k)),
        "skip_mm_profiling": options.kv_cache_memory_bytes is not None,
        # Where a prompt is cut, the draw at the cut is taken back, which a CPU's random generator can not do.
        "enable_chunked_prefill": not current_platform.is_cpu(),
        **ENGINE_ARGUMENTS,
        **options.vllm_kwargs,
    }


class Answer(NamedTuple):
    """One response that vLLM sampled.

    Attributes:
        token_ids: its tokens.
        logprobs: the log-probability of each.
        likeliest: for each, the log-probabilities of the likeliest tokens by id, as many as the request asked for.
    """

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    likeliest: Sequence[Mapping[int, float]] = ()


@dataclass(frozen=True)
class Images:
    """The images of a prompt, in the form that vLLM takes.

    Attributes:
        items: pixels and grid of each image.
        hashes: hash of the contents of each image, by which vLLM's caches look it up.
        places: offset and length of each image's placeholders in the prompt.
    """

    items: MultiModalKwargsItems
    hashes: list[str]
    places: list[PlaceholderRange]


class Translator:
    """Translates prompts to vLLM's requests, and its answers to rollouts.

    Args:
        context: everything that the engine is built from.
    """

    def __init__(self, context: base.Context) -> None:
        self._image_token_id = context.image_token_id
        self._merge = context.spatial_merge_size**2
        self._decode: Callable[[Sequence[int]], str] = context.decode
        self._eos = set(context.eos_token_ids)
        self._banned = frozenset(context.banned_token_ids)
        self._max_new_tokens = context.policy.generation.max_new_tokens
        self._images_per_prompt = context.policy.generation.vllm_cfg.images_per_prompt
        if not self._eos or self._eos & self._banned:
            raise ValueError(
                f"responses could not end: eos_token_ids {sorted(self._eos)} must be non-empty and disjoint from "
                f"banned_token_ids {sorted(self._banned)}"
            )

    def images(self, prompt: Prompt) -> Images | None:
        """Return the images of a prompt; None where it has none.

        Raises:
            ValueError: its placeholders do not match its images, or it has too many images; the prompt is named.
        """
        inputs = prompt.inputs
        if len(inputs.image_grid_thw) > self._images_per_prompt:
            raise ValueError(
                f"prompt {prompt.key!r} has {len(inputs.image_grid_thw)} images, more than "
                f"policy.generation.vllm_cfg.images_per_prompt ({self._images_per_prompt})"
            )
        patches = inputs.image_grid_thw.prod(-1)
        places = self._places(prompt, (patches // self._merge).tolist())
        if not len(patches):
            return None
        fields = {
            "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", patches),
            "image_grid_thw": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }
        features = BatchFeature({"pixel_values": inputs.pixel_values, "image_grid_thw": inputs.image_grid_thw})
        return Images(
            MultiModalKwargsItems.from_hf_inputs(features, fields),
            [image.name for image in images_of(inputs.pixel_values, inputs.image_grid_thw)],
            places,
        )

    def _places(self, prompt: Prompt, lengths: list[int]) -> list[PlaceholderRange]:
        """Find the placeholders of each image, which form one run of tokens; two runs may touch."""
        inputs = prompt.inputs
        where = (inputs.token_ids == self._image_token_id).nonzero().squeeze(1)
        places: list[PlaceholderRange] = []
        used = 0
        for length in lengths:
            run = where[used : used + length]
            if len(run) != length or int(run[-1] - run[0]) != length - 1:
                break
            places.append(PlaceholderRange(offset=int(run[0]), length=length))
            used += length
        patches = int(inputs.image_grid_thw.prod(-1).sum())
        if len(places) != len(lengths) or used != len(where) or len(inputs.pixel_values) != patches:
            raise ValueError(
                f"prompt {prompt.key!r}: its {len(inputs.token_ids)} tokens hold {len(where)} image placeholders where "
                f"its image grids ask for {lengths}, each in one run, and it has {len(inputs.pixel_values)} of "
                f"{patches} patches"
            )
        return places

    def parameters(self, prompt: Prompt, n: int, sampling: base.Sampling, seed: int) -> SamplingParams:
        """Return vLLM's sampling parameters for a prompt. Sample ``i`` has a generator of its own (vLLM: seed + i).

        A greedy response is requested once only: ``rollouts`` repeats it.
        """
        greedy = sampling.temperature == 0
        return SamplingParams(
            n=1 if greedy else n,
            temperature=sampling.temperature,
            top_p=1.0 if sampling.top_p is None else sampling.top_p,
            top_k=0 if sampling.top_k is None else sampling.top_k,
            min_p=0.0 if sampling.min_p is None else sampling.min_p,
            seed=None if greedy else _seed(seed, prompt.key),
            max_tokens=self._max_new_tokens,
            logprobs=num_logprobs(sampling.top_k if sampling.return_kept else None),
            logit_bias=dict.fromkeys(sorted(self._banned), _NEVER) or None,
            stop_token_ids=sorted(self._eos),
            ignore_eos=True,  # the model directory's own end tokens; ours are above
            stop=list(sampling.stop_strings),
            detokenize=bool(sampling.stop_strings),  # vLLM looks for them in its own text
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def rollouts(
        self, prompt: Prompt, group_id: int, n: int, sampling: base.Sampling, answers: Sequence[Answer]
    ) -> list[Rollout]:
        """Return the rollouts of one group.

        Args:
            prompt: the prompt that was asked.
            group_id: id of its group.
            n: number of responses that were requested.
            sampling: how they were to be sampled.
            answers: vLLM's answers, in the order of its samples: ``n`` of them, or one that stands for all.

        Raises:
            RuntimeError: another number of answers, or an answer that cannot be used; the prompt is named.
        """
        if len(answers) not in (1, n):
            raise RuntimeError(f"prompt {prompt.key!r}: vLLM gave {len(answers)} of {n} answers")
        everyone = list(answers) if len(answers) == n else [answers[0]] * n
        return [self._rollout(prompt, group_id, index, sampling, answer) for index, answer in enumerate(everyone)]

    def _rollout(
        self, prompt: Prompt, group_id: int, sample_index: int, sampling: base.Sampling, answer: Answer
    ) -> Rollout:
        """Return the rollout of one answer.

        Raises:
            RuntimeError: the answer has no token, lacks a log-probability or has one that is not finite, or holds a
                token that must not be sampled; prompt and sample are named.
        """
        name = f"prompt {prompt.key!r}, sample {sample_index}"
        token_ids = list(answer.token_ids)
        values = torch.tensor(answer.logprobs, dtype=torch.float32)
        if not token_ids or len(values) != len(token_ids) or not values.isfinite().all():
            raise RuntimeError(
                f"{name}: vLLM answered {len(token_ids)} tokens with {int(values.isfinite().sum())} finite "
                "log-probabilities; the weights have diverged or overflow in this dtype"
            )
        if not self._banned.isdisjoint(token_ids):
            raise RuntimeError(f"{name}: vLLM sampled banned tokens: {sorted(self._banned.intersection(token_ids))}")
        text, truncated = read_response(
            token_ids, eos_token_ids=self._eos, stop_strings=sampling.stop_strings, decode=self._decode
        )
        return Rollout(
            prompt=prompt,
            group_id=group_id,
            sample_index=sample_index,
            response_ids=torch.tensor(token_ids, dtype=torch.int64),
            logprobs=values,
            text=text,
            truncated=truncated,
            kept_ids=_kept(answer, name) if sampling.return_kept else None,
        )


def _kept(answer: Answer, name: str) -> Tensor:
    """Return the tokens that each token of an answer was sampled from: int64 ``[R, K]``, -1 where there are fewer.

    Raises:
        RuntimeError: they are not all there, or the sampled token is not among them; ``name`` says whose they are.
    """
    rows: list[Tensor] = []
    for token, likeliest in zip(answer.token_ids, answer.likeliest, strict=True):
        kept = {other: value for other, value in likeliest.items() if value > _LEAST}
        mass = math.fsum(map(math.exp, kept.values()))
        if token not in kept or abs(mass - 1.0) > _MASS:
            raise RuntimeError(
                f"{name}: the {len(kept)} tokens that vLLM says it kept have probability {mass:.4f} together, not 1; "
                f"policy.generation.top_k ties with more than {_TIES} others: raise it, or lower top_p"
            )
        rows.append(torch.tensor(sorted(kept)))
    return pad_sequence(rows, batch_first=True, padding_value=-1)


def _seed(seed: int, key: str) -> int:
    """Return the seed, of 62 bits, of a prompt's random draws."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:8], "little") >> 2
