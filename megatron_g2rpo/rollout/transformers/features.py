# SPDX-License-Identifier: Apache-2.0
"""The features of a call's images: each distinct image is encoded once, and forgotten with the last that needs it.

To the last bit an image's features depend on those that are encoded with it. Which are is a matter of the prompts and
their order alone, not of when responses end: a recorded step is taken again with the same (``train.replay``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import Tensor

from megatron_g2rpo.models.images import Image
from megatron_g2rpo.rollout.transformers.prefill import PASS_PATCHES, PromptTokens, passes


class Features:
    """Gives the features of images to the passes that prefill prompts.

    Args:
        prompts: the distinct prompts of the call, each of which is prefilled once, in about the order in which they
            are: the images of a prompt are encoded after those of all prompts before it.
        encode: function that gives the features ``[F, L, H]`` of each image.
    """

    def __init__(self, prompts: Sequence[PromptTokens], encode: Callable[[Sequence[Image]], list[Tensor]]) -> None:
        self._encode = encode
        self._needed = Counter(image.name for prompt in prompts for image in prompt.images)
        self._blocks = in_blocks(image for prompt in prompts for image in prompt.images)
        self._there: dict[str, Tensor] = {}

    def __call__(self, prompts: Sequence[PromptTokens]) -> list[Tensor]:
        """Return the features of all images of the prompts, in order; it is called once for each prompt."""
        images = [image for prompt in prompts for image in prompt.images]
        while any(image.name not in self._there for image in images):
            block = next(self._blocks)
            self._there.update(zip((image.name for image in block), self._encode(block), strict=True))
        features = [self._there[image.name] for image in images]
        self._needed.subtract(image.name for image in images)
        for image in images:
            if self._needed[image.name] == 0:
                self._there.pop(image.name, None)
        return features


def in_blocks(images: Iterable[Image]) -> Iterator[list[Image]]:
    """Yield the distinct images in their order, those together that are encoded together."""
    distinct = list({image.name: image for image in images}.values())
    for start, stop in passes([image.num_patches for image in distinct], PASS_PATCHES):
        yield distinct[start:stop]
