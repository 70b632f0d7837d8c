# SPDX-License-Identifier: Apache-2.0
"""What a sample must hold beside being readable: checks of a prompt, each of which raises ``SampleError``.

The stream applies them where it decodes a sample, before any token is generated for it, so that
``data.on_bad_sample: skip`` replaces what they refuse like an image that cannot be decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from megatron_g2rpo import registry
from megatron_g2rpo.data.errors import SampleError
from megatron_g2rpo.data.processing import ChatProcessor
from megatron_g2rpo.recipe import Env, Policy
from megatron_g2rpo.tasks.prompts import continuation
from megatron_g2rpo.types import Prompt

Check = Callable[[Prompt], None]
ACCURACY = "accuracy"


def prompt_fits(policy: Policy) -> Check:
    """Return the check that a prompt leaves room for the longest response, tokens; reason ``too_long``."""
    room = policy.max_total_sequence_length - policy.generation.max_new_tokens

    def check(prompt: Prompt) -> None:
        length = len(prompt.inputs.token_ids)
        if length > room:
            raise SampleError(
                f"sample {prompt.key}: its prompt has {length} tokens, more than the {room} that "
                "policy.max_total_sequence_length leaves beside policy.generation.max_new_tokens; lower "
                "data.max_pixels, raise policy.max_total_sequence_length, or set data.on_bad_sample=skip",
                "too_long",
            )

    return check


def reference_is_readable(answer_formats: Mapping[str, str | None]) -> Check:
    """Return the check that a sample's answer format reads its reference; reason ``reference``.

    The reference is scored against itself. What it earns is not looked at: only that the format does not raise.

    Args:
        answer_formats: task -> answer format of all its samples; None: the one that each sample names. Samples of other
            tasks are not checked. See ``scored_formats``.
    """

    def check(prompt: Prompt) -> None:
        if prompt.task not in answer_formats:
            return
        sample = prompt.sample
        name = answer_formats[prompt.task] or sample.answer_format
        try:
            registry.answer_formats.get(name)(sample.answer, sample)
        except Exception as error:  # a user's format may raise anything
            raise SampleError(
                f"sample {sample.key}, task {sample.task!r}: the reference {sample.answer!r} cannot be read under "
                f"answer format {name!r} ({type(error).__name__}: {error}); repair it, name another format in "
                "env.tasks.<task>.answer_format, or set data.on_bad_sample=skip",
                "reference",
            ) from error

    return check


def scored_formats(env: Env) -> dict[str, str | None]:
    """Return task -> its answer format, for the tasks whose accuracy is computed; see ``reference_is_readable``."""
    return {
        name: task.answer_format
        for name, task in env.tasks.items()
        if ACCURACY in env.reward_weights or ACCURACY in task.reward_weights
    }


def response_fits(processor: ChatProcessor, max_tokens: int) -> Check:
    """Return the check that a sample has a response to learn, which fits beside its prompt.

    Args:
        processor: encodes the response.
        max_tokens: largest number of tokens of prompt and response together.

    The reasons are ``response`` for one that is missing, and ``too_long``.
    """

    def check(prompt: Prompt) -> None:
        response = prompt.sample.response
        if response is None:
            raise SampleError(
                f"sample {prompt.key} has no response; supervised training needs one in every sample", "response"
            )
        tokens = processor.encode_response(continuation(response, prompt.response_prefix), name=f"sample {prompt.key}")
        length = len(prompt.inputs.token_ids) + len(tokens)
        if length > max_tokens:
            raise SampleError(
                f"sample {prompt.key}: prompt and response have {length} tokens, more than "
                f"policy.max_total_sequence_length ({max_tokens}); raise it, lower data.max_pixels, or set "
                "data.on_bad_sample=skip",
                "too_long",
            )

    return check
