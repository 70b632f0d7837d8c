# SPDX-License-Identifier: Apache-2.0
"""What every rollout engine offers, and the registry of engines by backend name.

An engine is fed weights under their Hugging Face names and returns rollouts; it never sees the policy. A new one is a
file in this package with ``@register("name")`` on its class and a line in ``_MODULES``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from megatron_g2rpo.nouns import Prompt, Rollout


class Engine(Protocol):
    """Turns prompts into samples of the policy whose weights it was given last."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace all weights by the stream's ``(Hugging Face name, full tensor)`` pairs; every parameter must come."""
        ...

    def generate(
        self, prompts: Sequence[Prompt], n: int, *, temperature: float, seed: int, group_ids: Sequence[int]
    ) -> list[Rollout]:
        """Sample ``n`` responses to each prompt, ordered by prompt and then by ``sample_index``.

        The sampled tokens are a function of the weights, ``seed``, the prompt and ``sample_index``: they must not
        depend on which prompts share a call, a batch or a rank.

        Args:
            prompts: this rank's prompts; none gives an empty list.
            n: responses per prompt.
            temperature: of the sampling distribution; 0 is greedy.
            seed: changes every random draw; give each step its own.
            group_ids: one per prompt, unique over all ranks; carried to the rollouts.
        """
        ...


EngineClass = TypeVar("EngineClass", bound=Callable[..., Engine])

_ENGINES: dict[str, Callable[..., Engine]] = {}
# Engines live in modules that import heavy, partly optional packages: they are imported when asked for.
_MODULES = {"transformers": "megatron_g2rpo.rollout.transformers_engine"}


def register(name: str) -> Callable[[EngineClass], EngineClass]:
    """Class decorator: make an engine known as ``policy.generation.backend: <name>``."""

    def add(engine: EngineClass) -> EngineClass:
        if name in _ENGINES:
            raise ValueError(f"rollout engine {name!r} is registered twice: {_ENGINES[name]} and {engine}")
        _ENGINES[name] = engine
        return engine

    return add


def get(name: str) -> Callable[..., Engine]:
    """The engine class of a backend name.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.
    """
    if name not in _ENGINES and name in _MODULES:
        importlib.import_module(_MODULES[name])
    if name not in _ENGINES:
        known = ", ".join(sorted(_ENGINES.keys() | _MODULES.keys()))
        raise ValueError(f"policy.generation.backend: unknown rollout engine {name!r}; known: {known}")
    return _ENGINES[name]
