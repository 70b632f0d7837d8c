# SPDX-License-Identifier: Apache-2.0
"""The features of a call's images: each distinct image is encoded once, and forgotten with the last that needs it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from torch import Tensor

from megatron_g2rpo.models.images import Image
from megatron_g2rpo.rollout.transformers.prefill import PromptTokens


class Features:
    """Gives the features of images to the passes that prefill prompts.

    Args:
        prompts: the distinct prompts of the call, each of which is prefilled once.
        encode: function that gives the features ``[F, L, H]`` of each image.
    """

    def __init__(self, prompts: Sequence[PromptTokens], encode: Callable[[Sequence[Image]], list[Tensor]]) -> None:
        self._encode = encode
        self._needed = Counter(image.name for prompt in prompts for image in prompt.images)
        self._there: dict[str, Tensor] = {}

    def __call__(self, prompts: Sequence[PromptTokens]) -> list[Tensor]:
        """Return the features of all images of the prompts, in order; it is called once for each prompt."""
        images = [image for prompt in prompts for image in prompt.images]
        missing = list({image.name: image for image in images if image.name not in self._there}.values())
        if missing:
            self._there.update(zip((image.name for image in missing), self._encode(missing), strict=True))
        features = [self._there[image.name] for image in images]
        self._needed.subtract(image.name for image in images)
        for image in images:
            if self._needed[image.name] == 0:
                self._there.pop(image.name, None)
        return features
