# SPDX-License-Identifier: Apache-2.0
"""Functions found by the name a recipe gives them: a new one is one function and one decorator."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, Generic, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


class Registry(Generic[F]):
    """Named functions of one kind. Their keyword-only parameters are the options a recipe may set.

    Args:
        kind: what the functions are, for error messages, for example ``"advantage estimator"``.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._functions: dict[str, F] = {}

    def register(self, name: str) -> Callable[[F], F]:
        """Decorator that files a function under ``name``.

        Raises:
            ValueError: the name is taken.
        """

        def file(function: F) -> F:
            if name in self._functions:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._functions[name] = function
            return function

        return file

    def names(self) -> tuple[str, ...]:
        """Registered names, sorted."""
        return tuple(sorted(self._functions))

    def get(self, name: str) -> F:
        """Returns the function registered as ``name``.

        Raises:
            ValueError: unknown name; the message lists the known ones and the nearest.
        """
        if name not in self._functions:
            raise ValueError(f"unknown {self.kind} {name!r}{_nearest(name, self.names())}")
        return self._functions[name]

    def options(self, name: str) -> tuple[str, ...]:
        """Names of the options (keyword-only parameters) that ``name`` takes, in the order of its signature."""
        parameters = inspect.signature(self.get(name)).parameters.values()
        return tuple(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)

    def bind(self, name: str, **options: Any) -> Callable[..., Any]:
        """Returns the function ``name`` with ``options`` filled in.

        Raises:
            ValueError: unknown name, or an option that the function does not take.
        """
        known = self.options(name)
        for option in options:
            if option not in known:
                raise ValueError(f"{self.kind} {name!r} takes no option {option!r}{_nearest(option, known)}")
        return functools.partial(self.get(name), **options)


def _nearest(name: str, known: tuple[str, ...]) -> str:
    matches = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {matches[0]!r}?)" if matches else ""
    return f"{hint}; known: {', '.join(known) or 'none'}"
