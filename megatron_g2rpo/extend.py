# SPDX-License-Identifier: Apache-2.0
"""The doors for users: decorators that give a recipe a name to use.

Put them in a file of your own and name it in the recipe, ``imports: [my_rewards.py]``: it is imported in every process,
before the recipe's names are checked. ``docs/extending.md`` shows each in ten lines.

An entry's keyword-only parameters, with annotation and default, are its options in the recipe.
"""

from megatron_g2rpo import registry

answer_format = registry.answer_formats.register
"""``(answer: str, sample: Sample) -> float``: how right an answer is, 0 to 1."""
reward_part = registry.reward_parts.register
"""``(sample: Sample, response: Response) -> float``; ``batched=True``: of lists of both, to a list of numbers."""
response_format = registry.response_formats.register
"""A ``tasks.response_formats.ResponseFormat``: what the prompt asks for, and where thinking and answer are found."""
estimator = registry.estimators.register
"""``(batch: RewardBatch, history: History) -> Tensor``: rewards of the global batch to advantages, float64 ``[N]``."""
surrogate = registry.surrogates.register
"""``(logprobs, old_logprobs, advantages, sequences) -> PolicyLoss``: the loss of each token."""
engine = registry.engines.register
"""A class with the methods of ``rollout.base.Engine``: prompts to rollouts."""
importer = registry.importers.register
"""A function that reads a dataset of another format, sample by sample."""
model_family = registry.model_families.register
"""A ``models.base.Family``, by its ``model_type`` in config.json."""

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
