# SPDX-License-Identifier: Apache-2.0
"""Registries: functions and classes, a user's among them, that a recipe refers to by name.

Each kind of thing has one registry. An entry is made by a decorator (``megatron_g2rpo.extend`` has them all), in this
package or in a file of the user's that the recipe's ``imports:`` names. An entry's keyword-only parameters, with their
annotations and defaults, are its options in the recipe: one default, in one place.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Entry(Generic[T]):
    """One thing that can be named.

    Attributes:
        name: what recipes and datasets call it.
        value: the registered function or class.
        place: where it was registered, ``file.py:line``.
        facts: further keyword arguments of its registration.
    """

    name: str
    value: T
    place: str
    facts: Mapping[str, Any] = field(default_factory=dict)


class Registry(Generic[T]):
    """Named functions or classes of one kind.

    Args:
        kind: what an entry is, in the singular, for messages: ``"advantage estimator"``.
        builtin: modules of this package that register entries; imported before the first look-up.
        on_demand: name -> module that registers it, for entries whose modules import heavy or optional packages. Such a
            module is imported when its name is asked for.
        signature: entry -> the callable whose keyword-only parameters are its options; the entry itself by default.
        given: keyword-only parameters that the trainer fills in and a recipe cannot set.
        positional: names of the arguments that an entry is called with, in their order; None where it is not called.
        methods: names of what an entry must have, where it is a class or an instance.
        facts: names of what may be said of an entry beside its name.
        has_options: whether a recipe has a place for options; without one, every other keyword-only parameter needs a
            default.
    """

    def __init__(
        self,
        kind: str,
        *,
        builtin: Sequence[str] = (),
        on_demand: Mapping[str, str] | None = None,
        signature: Callable[[T], Callable[..., Any]] | None = None,
        given: Collection[str] = (),
        positional: Sequence[str] | None = None,
        methods: Sequence[str] = (),
        facts: Collection[str] = (),
        has_options: bool = True,
    ) -> None:
        self.kind = kind
        self._positional, self._methods = positional, tuple(methods)
        self._facts, self._has_options = frozenset(facts), has_options
        self.given = frozenset(given)
        self.on_demand = dict(on_demand or {})
        self._builtin = tuple(builtin)
        self._signature = signature
        self._entries: dict[str, Entry[T]] = {}
        # Name -> its entry, and what that takes: a reward part is asked for each of a thousand responses.
        self._taken: dict[str, tuple[Entry[T], dict[str, inspect.Parameter]]] = {}
        self._is_complete = False

    def register(self, name: str, **facts: Any) -> Callable[[T], T]:
        """Return a decorator that registers a function or class under ``name``.

        Args:
            name: name in recipes and datasets.
            facts: further facts that must be known of the entry before it runs; each kind documents its own.

        Raises:
            ValueError: the name is taken, and the message says where it was registered; it cannot be a key of a
                recipe; or the entry is not of the kind: it takes other arguments, or lacks a method.
        """
        caller = sys._getframe(1)
        place = f"{caller.f_code.co_filename}:{caller.f_lineno}"
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"{self.kind} {name!r} at {place}: a name is text without a dot, as keys of recipes are")

        foreign = sorted(facts.keys() - self._facts)
        if foreign:
            raise ValueError(
                f"{self.kind} {name!r} at {place}: unknown {foreign[0]!r}{nearest(foreign[0], self._facts)}"
            )

        def file(value: T) -> T:
            self._check(name, value, place)
            self._complete()
            taken = self._entries.get(name)
            # The module of an entry that is made on demand registers it when it is imported.
            module = self.on_demand.get(name)
            if taken is None and module is not None and getattr(value, "__module__", None) != module:
                try:
                    taken = self.entry(name)
                except ImportError as error:  # the name is taken even where its package is not installed
                    raise ValueError(f"{self.kind} {name!r} is registered twice: in {module} and at {place}") from error
            if taken is not None:
                raise ValueError(f"{self.kind} {name!r} is registered twice: at {taken.place} and at {place}")
            self._entries[name] = Entry(name=name, value=value, place=place, facts=facts)
            return value

        return file

    def names(self) -> tuple[str, ...]:
        """Return all known names, sorted."""
        self._complete()
        return tuple(sorted(self._entries.keys() | self.on_demand.keys()))

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def entry(self, name: str) -> Entry[T]:
        """Return the entry of a name.

        Raises:
            ValueError: unknown name; the message lists the known ones and the nearest.
            ModuleNotFoundError: the package that the entry needs is not installed.
        """
        self._complete()
        if name not in self._entries and name in self.on_demand:
            importlib.import_module(self.on_demand[name])
        if name not in self._entries:
            raise ValueError(self.unknown(name))
        return self._entries[name]

    def get(self, name: str) -> T:
        """Return the function or class of a name.

        Raises:
            ValueError, ModuleNotFoundError: see ``entry``.
        """
        return self.entry(name).value

    def unknown(self, name: str) -> str:
        """Return the error message for an unknown name, with the known names and the nearest one."""
        return f"unknown {self.kind} {name!r}{nearest(name, self.names())}"

    def callable(self, name: str) -> Callable[..., Any]:
        """Return the callable of an entry that takes its options.

        Raises:
            ValueError, ModuleNotFoundError: see ``entry``.
        """
        value: Any = self.get(name)
        return value if self._signature is None else self._signature(value)

    def options(self, name: str) -> dict[str, inspect.Parameter]:
        """Return the options that a recipe may set: keyword-only parameters by name, in the order of the signature.

        Raises:
            ValueError, ModuleNotFoundError: see ``entry``.
        """
        return {key: option for key, option in self._keywords(name).items() if key not in self.given}

    def takes(self, name: str, keyword: str) -> bool:
        """Return whether an entry has a keyword-only parameter of this name, an option or one of ``given``."""
        return keyword in self._keywords(name)

    def bind(self, name: str, **keywords: Any) -> Callable[..., Any]:
        """Return the callable of an entry with some of its keyword-only parameters filled in.

        Raises:
            ValueError: unknown name, or a keyword that it does not take.
            ModuleNotFoundError: see ``entry``.
        """
        known = tuple(self._keywords(name))
        for keyword in keywords:
            if keyword not in known:
                raise ValueError(f"{self.kind} {name!r} takes no option {keyword!r}{nearest(keyword, known)}")
        return functools.partial(self.callable(name), **keywords)

    def _check(self, name: str, value: Any, place: str) -> None:
        """Refuse what could not be called or asked later, in the middle of a run."""
        lacking = [method for method in self._methods if not hasattr(value, method)]
        if lacking:
            raise ValueError(f"{self.kind} {name!r} at {place}: it has no {lacking[0]!r}")
        if self._positional is None:
            return
        try:
            signature = inspect.signature(value)
        except (TypeError, ValueError):  # not every callable of C says what it takes
            return
        wanted = ", ".join(self._positional)
        needed = [
            parameter.name
            for parameter in signature.parameters.values()
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty
        ]
        try:
            signature.bind(*self._positional, **dict.fromkeys(needed))
        except TypeError as error:
            raise ValueError(
                f"{self.kind} {name!r} at {place}: it takes {signature}, and must take ({wanted})"
            ) from error
        homeless = [] if self._has_options else [option for option in needed if option not in self.given]
        if homeless:
            raise ValueError(f"{self.kind} {name!r} at {place}: its parameter {homeless[0]!r} needs a default")

    def forget(self, file: str) -> None:
        """Drop what a file has registered: its import failed, and may be tried again."""
        self._entries = {name: entry for name, entry in self._entries.items() if entry.place.rpartition(":")[0] != file}

    def _keywords(self, name: str) -> dict[str, inspect.Parameter]:
        entry = self.entry(name)
        known, keywords = self._taken.get(name, (None, {}))
        if known is not entry:  # new, or registered again after it was forgotten
            parameters = inspect.signature(self.callable(name)).parameters.values()
            keywords = {each.name: each for each in parameters if each.kind is each.KEYWORD_ONLY}
            self._taken[name] = (entry, keywords)
        return keywords

    def _complete(self) -> None:
        if self._is_complete:
            return
        self._is_complete = True  # first: these modules register, and thereby come by here
        try:
            for module in self._builtin:
                importlib.import_module(module)
        except BaseException:
            self._is_complete = False
            raise


def nearest(name: str, known: Collection[str]) -> str:
    """Return the end of the message for a wrong name: `` (did you mean 'x'?); known: x, y``."""
    matches = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {matches[0]!r}?)" if matches else ""
    return f"{hint}; known: {', '.join(sorted(known)) or 'none'}"


# The kinds. Beside each: what an entry is; ``megatron_g2rpo.extend`` says it in full.
estimators: Registry[Any] = Registry(
    "advantage estimator",
    builtin=["megatron_g2rpo.objective.estimators"],
    positional=["batch", "history"],
    facts=["uses_parts", "min_group_size", "check"],
)
surrogates: Registry[Any] = Registry(
    "surrogate",
    builtin=["megatron_g2rpo.objective.surrogates"],
    given=["log_ratio_clamp"],
    positional=["logprobs", "old_logprobs", "advantages", "sequences"],
)
answer_formats: Registry[Any] = Registry(
    "answer format",
    builtin=["megatron_g2rpo.tasks.answers"],
    positional=["answer", "sample"],
    has_options=False,
)
reward_parts: Registry[Any] = Registry(
    "reward part",
    builtin=["megatron_g2rpo.tasks.reward_parts", "megatron_g2rpo.tasks.judge"],
    given=["settings"],
    positional=["sample", "response"],
    facts=["batched"],
)
response_formats: Registry[Any] = Registry(
    "response format",
    builtin=["megatron_g2rpo.tasks.response_formats"],
    methods=["instruction", "read", "find_thinking", "find_answer", "is_well_formed"],
)
engines: Registry[Any] = Registry(
    "rollout engine",
    on_demand={
        "transformers": "megatron_g2rpo.rollout.transformers.engine",
        "vllm": "megatron_g2rpo.rollout.vllm.engine",
        "vllm_server": "megatron_g2rpo.rollout.vllm.server_engine",
    },
    signature=lambda engine: engine.build,
    methods=["build", "load_weights", "generate", "release"],
)
importers: Registry[Any] = Registry(
    "data importer", builtin=["megatron_g2rpo.data.importers"], positional=["source"], facts=["matches"]
)
model_families: Registry[Any] = Registry("model family", builtin=["megatron_g2rpo.models"])
KINDS: tuple[Registry[Any], ...] = (
    *(estimators, surrogates, answer_formats, reward_parts, response_formats),
    *(engines, importers, model_families),
)
