# SPDX-License-Identifier: Apache-2.0
"""The extension points: decorators that register a user's code under a name, which a recipe can then use.

Put them in a file of your own and name it in the recipe, ``imports: [my_rewards.py]``: it is imported in every process,
before the recipe's names are checked. ``docs/extending.md`` shows each in ten lines.

An entry's keyword-only parameters, with annotation and default, are its options in the recipe.
"""

from megatron_g2rpo import registry

answer_format = registry.answer_formats.register
"""Register an answer format, ``(answer: str, sample: Sample) -> float``: how right an answer is, 0 to 1."""
reward_part = registry.reward_parts.register
"""Register a reward part, ``(sample: Sample, response: Response) -> float``: one part of a response's reward.

Under ``batched=True`` the function gets a list of samples and a list of responses, and returns a list of numbers.
"""
response_format = registry.response_formats.register
"""Register a response format, a ``tasks.response_formats.ResponseFormat``.

It says what the prompt asks a response to look like, and where thinking and answer are found in it.
"""
estimator = registry.estimators.register
"""Register an advantage estimator, ``(batch: RewardBatch, history: History) -> Tensor``.

It turns the rewards of the global batch into advantages, float64 ``[N]``.
"""
surrogate = registry.surrogates.register
"""Register a surrogate, ``(logprobs, old_logprobs, advantages, sequences) -> PolicyLoss``: the loss of each token."""
engine = registry.engines.register
"""Register a rollout engine, a class with the methods of ``rollout.base.Engine`` that turns prompts into rollouts."""
importer = registry.importers.register
"""Register an importer, a function that reads a dataset of another format, sample by sample.

Its fact ``matches``, a function of one row, tells ``data import`` that a source looks like its own.
"""
model_family = registry.model_families.register
"""Register a model family, a ``models.base.Family``, under its ``model_type`` in config.json."""

__all__ = [
    "answer_format",
    "engine",
    "estimator",
    "importer",
    "model_family",
    "response_format",
    "reward_part",
    "surrogate",
]
