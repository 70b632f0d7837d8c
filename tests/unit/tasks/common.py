# SPDX-License-Identifier: Apache-2.0
"""A sample, a rollout and an `env` section, of which a test says only what it is about."""

from __future__ import annotations

from typing import Any

import torch

from megatron_g2rpo.recipe import Env, Task, Trapezoid
from megatron_g2rpo.types import ModelInputs, Prompt, Response, Rollout, Sample

BOUNDS = Trapezoid(start=0, peak_start=4, peak_end=8, end=16)


def make_sample(**changes: Any) -> Sample:
    fields: dict[str, Any] = {
        "key": "shard-000001/train-000007",
        "task": "math",
        "question": "What is the left digit plus the right digit?",
        "answer": "12",
        "answer_format": "numeric",
    }
    return Sample(**(fields | changes))


def make_rollout(
    text: str, *, prefix: str = "", num_tokens: int = 4, truncated: bool = False, **sample: Any
) -> Rollout:
    nothing = ModelInputs(
        token_ids=torch.zeros(1, dtype=torch.int64),
        pixel_values=torch.zeros(0, 1),
        image_grid_thw=torch.zeros(0, 3, dtype=torch.int64),
    )
    return Rollout(
        prompt=Prompt(sample=make_sample(**sample), inputs=nothing, task_id=0, response_prefix=prefix),
        group_id=0,
        sample_index=3,
        response_ids=torch.zeros(num_tokens, dtype=torch.int64),
        logprobs=torch.zeros(num_tokens),
        text=text,
        truncated=truncated,
    )


def make_response(text: str = "", **changes: Any) -> Response:
    fields = {
        "text": text,
        "thinking": None,
        "answer": None,
        "is_well_formed": True,
        "num_tokens": 4,
        "truncated": False,
        "sample_index": 3,
    }
    return Response(**(fields | changes))


def make_task(**changes: Any) -> Task:
    fields = {"answer_format": None, "response_format": None, "length": None, "entropy": None, "reward_weights": {}}
    return Task(**(fields | changes))


def make_env(weights: dict[str, float], **tasks: Task) -> Env:
    """With the task `math` unless others are given."""
    return Env(
        reward_weights=weights,
        reward_options={},
        reward_workers=0,
        reward_timeout_s=30.0,
        reward_batch_timeout_s=60.0,
        max_failed_rewards=0.0,
        default_task=make_task(),
        tasks=tasks or {"math": make_task()},
    )
