# SPDX-License-Identifier: Apache-2.0
"""Look-up of every name of a recipe in the registry of its kind, before anything is built.

It works on the tree as it was read, so that a wrong name is reported together with every other fault. The registries
import this package's own entries at the first look-up; a recipe's ``imports`` have been imported by then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_g2rpo import registry
from megatron_g2rpo.recipe.errors import Fault
from megatron_g2rpo.recipe.grpo_section import AdvEstimator
from megatron_g2rpo.recipe.keys import dotted, quoted
from megatron_g2rpo.recipe.loss_section import LossFn
from megatron_g2rpo.recipe.named import checked_options, complete, unknown
from megatron_g2rpo.registry import Registry


def check_names(tree: dict[str, Any]) -> list[Fault]:
    """Look up every name, check the options that belong to it, and fill in those that are not given.

    Args:
        tree: the keys of a recipe, interpolated; missing options are filled in, in place. A value that does not have
            the form of a recipe is left to validation.

    Returns:
        All faults that were found.
    """
    return [
        *_estimator(_mapping(tree, "grpo")),
        *_surrogate(tree),
        *_engine(_mapping(_mapping(tree, "policy"), "generation")),
        *_response_formats(tree),
        *_tasks(_mapping(tree, "env")),
    ]


def _estimator(grpo: dict[str, Any]) -> Iterator[Fault]:
    section, where = _mapping(grpo, "adv_estimator"), "grpo.adv_estimator"
    faults = list(complete(section, registry.estimators, AdvEstimator, where))
    yield from faults
    name = section.get("name")
    if faults or not isinstance(name, str) or name not in registry.estimators:
        return
    facts = registry.estimators.entry(name).facts
    options = {key: value for key, value in section.items() if key not in AdvEstimator.model_fields}
    if "check" in facts:
        try:
            facts["check"](**options)
        except Exception as error:  # noqa: BLE001 (a user's function may raise anything)
            # The option that the message names, so that its line can be shown.
            key = next((f"{where}.{option}" for option in options if option in str(error)), where)
            yield Fault(key, f"'{key}': {error}")
            return
    least, samples = facts.get("min_group_size", 1), grpo.get("num_generations_per_prompt")
    least = least(**options) if callable(least) else least
    if isinstance(samples, int) and samples < least:
        yield Fault(
            "grpo.num_generations_per_prompt",
            f"a group of {samples} has no advantage under {registry.estimators.kind} {name!r}, as it is set: set "
            f"grpo.num_generations_per_prompt to {least} or more, or change grpo.adv_estimator",
        )


def _surrogate(tree: dict[str, Any]) -> Iterator[Fault]:
    yield from complete(_mapping(tree, "loss_fn"), registry.surrogates, LossFn, "loss_fn")


def _engine(generation: dict[str, Any]) -> Iterator[Fault]:
    where, name = "policy.generation", generation.get("backend")
    yield from _known(registry.engines, name, f"{where}.backend")
    options = generation.get("backend_cfg")
    if not isinstance(options, dict) or not isinstance(name, str) or name not in registry.engines:
        return
    if name in registry.engines.on_demand:
        # Not imported to be asked: vLLM may be installed elsewhere only. These take their settings from other sections.
        yield from (Fault(f"{where}.backend_cfg.{key}", f"{name!r} takes no option {key!r}") for key in options)
        return
    checked, faults = checked_options(registry.engines, name, options, f"{where}.backend_cfg")
    generation["backend_cfg"] = checked
    yield from faults


def _response_formats(tree: dict[str, Any]) -> Iterator[Fault]:
    name = _mapping(tree, "data").get("response_format")
    yield from _known(registry.response_formats, name, "data.response_format")


def _tasks(env: dict[str, Any]) -> Iterator[Fault]:
    yield from _weights(env, "env")
    yield from _reward_options(env)
    named = {"env.default_task": _mapping(env, "default_task")}
    tasks = _mapping(env, "tasks")
    named |= {dotted("env", "tasks", task): settings for task in tasks if (settings := _mapping(tasks, task))}
    said: list[Any] = []  # no set: a wrong value may be a list
    for where, task in named.items():
        for key, kind in (("answer_format", registry.answer_formats), ("response_format", registry.response_formats)):
            # What a task has from `default_task` is said there.
            if (key, task.get(key)) not in said:
                yield from _known(kind, task.get(key), f"{where}.{key}")
        if where == "env.default_task":
            said = [(key, task.get(key)) for key in ("answer_format", "response_format")]
        yield from _weights(task, where)


def _weights(section: dict[str, Any], where: str) -> Iterator[Fault]:
    for name in _mapping(section, "reward_weights"):
        yield from _known(registry.reward_parts, name, f"{where}.reward_weights.{quoted(str(name))}")


def _reward_options(env: dict[str, Any]) -> Iterator[Fault]:
    """Check the options of reward parts; fill in those of the parts that are weighed, which may lack needed ones."""
    options = env.get("reward_options")
    if not isinstance(options, dict):
        return
    tasks = _mapping(env, "tasks")
    weighed = [env, _mapping(env, "default_task"), *(_mapping(tasks, task) for task in tasks)]
    names = dict.fromkeys([*options, *(name for each in weighed for name in _mapping(each, "reward_weights"))])
    for name in names:
        where = f"env.reward_options.{name}"
        if name not in registry.reward_parts:
            if name in options:
                yield from _known(registry.reward_parts, name, where)
            continue
        given = options.get(name, {})
        if not isinstance(given, dict) or (not given and not registry.reward_parts.options(name)):
            continue
        options[name], faults = checked_options(registry.reward_parts, name, given, where)
        yield from faults


def _known(kind: Registry[Any], name: Any, where: str) -> Iterator[Fault]:
    if isinstance(name, str) and name and name not in kind:
        yield Fault(where, f"{where}: {unknown(kind, name)}")


def _mapping(tree: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = tree.get(key)
    return value if isinstance(value, dict) else {}
