# SPDX-License-Identifier: Apache-2.0
"""What a call of ``generate`` asks for: which prompts and images are the same, and the order of decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from megatron_g2rpo.models.images import images_of
from megatron_g2rpo.rollout.base import GenerationWork
from megatron_g2rpo.rollout.transformers.prefill import PromptTokens
from megatron_g2rpo.types import ModelInputs, Prompt


class Response(NamedTuple):
    """A response of a call.

    Attributes:
        greedy: whether it is the greedy one beside those that are sampled.
        prompt: index of its prompt in the call.
        sample: its index among those to the prompt.
    """

    greedy: bool
    prompt: int
    sample: int


class Call:
    """The prompts and responses of a call.

    Args:
        prompts: the prompts.
        n: number of responses to each.
        and_greedily: whether a greedy response to each follows.

    Attributes:
        prompts: the prompts.
        responses: the responses, in the order in which they are returned.
        distinct: prompts that differ in tokens or images.
        place: for each prompt its place among ``distinct``.
        order: numbers of the responses, in the order in which they are decoded.
    """

    def __init__(self, prompts: Sequence[Prompt], n: int, *, and_greedily: bool) -> None:
        self.prompts = prompts
        numbers = range(len(prompts))
        self.responses = [Response(False, prompt, sample) for prompt in numbers for sample in range(n)]
        if and_greedily:
            self.responses += [Response(True, prompt, 0) for prompt in numbers]
        contents = [_tokens_of(prompt.inputs) for prompt in prompts]
        first: dict[tuple[bytes, tuple[str, ...]], int] = {}
        self.distinct: list[PromptTokens] = []
        self.place: list[int] = []
        for content in contents:
            name = content.token_ids.numpy().tobytes(), content.image_names
            if name not in first:
                first[name] = len(self.distinct)
                self.distinct.append(content)
            self.place.append(first[name])
        self.order = sorted(range(len(self.responses)), key=self._turn())

    def _turn(self) -> Callable[[int], tuple[int, ...]]:
        """Return the key that responses are ordered by: those that share a prompt or images are neighbours.

        Beside that neighbours are of similar length, and the longest come first, so that running out of memory happens
        at once.
        """
        longest: dict[tuple[str, ...], int] = {}
        first: dict[tuple[str, ...], int] = {}
        alone = len(self.distinct)
        for place, prompt in enumerate(self.distinct):
            shown = prompt.image_names
            longest[shown] = max(longest.get(shown, 0), len(prompt.token_ids))
            first.setdefault(shown, place)

        def turn(number: int) -> tuple[int, ...]:
            response = self.responses[number]
            place = self.place[response.prompt]
            prompt, length = self.distinct[place], len(self.distinct[place].token_ids)
            shown = prompt.image_names
            family = (longest[shown], first[shown]) if shown else (length, alone)
            return (-family[0], family[1], -length, place, response.greedy, response.prompt, response.sample)

        return turn

    @property
    def entering(self) -> list[PromptTokens]:
        """The distinct prompts, in the order in which they enter."""
        places = dict.fromkeys(self.place[self.responses[number].prompt] for number in self.order)
        return [self.distinct[place] for place in places]

    def work(self, prefilled_tokens: int, encoded_patches: int, decoded_tokens: int) -> GenerationWork:
        """Return the work of the call, whose responses are ``decoded_tokens`` long together."""
        asked = [self.distinct[self.place[response.prompt]] for response in self.responses]
        return GenerationWork(
            prompt_tokens=prefilled_tokens,
            prompt_tokens_saved=sum(len(prompt.token_ids) for prompt in asked) - prefilled_tokens,
            decoded_tokens=decoded_tokens,
            patches=encoded_patches,
            patches_saved=sum(prompt.num_patches for prompt in asked) - encoded_patches,
        )


def _tokens_of(inputs: ModelInputs) -> PromptTokens:
    images = images_of(inputs.pixel_values, inputs.image_grid_thw)
    return PromptTokens(token_ids=inputs.token_ids, images=tuple(images))
