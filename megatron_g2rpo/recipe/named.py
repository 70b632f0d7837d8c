# SPDX-License-Identifier: Apache-2.0
"""Sections with a ``name``, which also take the options of the registry entry of that name.

The entry's keyword-only parameters, with their annotations and defaults, are the schema; each default exists once.
"""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ConfigDict, ValidationError, create_model
from pydantic_core import PydanticSerializationError, to_jsonable_python

from megatron_g2rpo.recipe.base import Section, Text
from megatron_g2rpo.recipe.errors import Fault, RecipeError
from megatron_g2rpo.registry import Registry, nearest


class NamedSection(Section):
    """A section with a ``name``, its own keys, and the options of the entry of that name."""

    # The options are checked by ``complete``, which knows the entry, before this model sees them.
    model_config = ConfigDict(extra="allow")

    name: Text
    """Name of an entry of the registry."""

    @property
    def options(self) -> dict[str, Any]:
        """Return all options of the named entry, defaults included."""
        return dict(self.model_extra or {})


def unknown(registry: Registry[Any], name: str) -> str:
    """Return what to say of a name in a recipe that nobody has registered."""
    return f"{registry.unknown(name)}. A name of your own is known once `imports` lists its file"


def complete(tree: dict[str, Any], registry: Registry[Any], own: type[NamedSection], where: str) -> Iterator[Fault]:
    """Check the options of a named section, and fill in those that are not given.

    Args:
        tree: the section as it was read; changed in place.
        registry: the registry that the name belongs to.
        own: class of the section; its own fields are not options.
        where: dotted key of the section.

    Yields:
        One fault for each wrong option. A section without a usable name is left to the validation of its class.
    """
    name = tree.get("name")
    if not isinstance(name, str) or not name:
        return
    if name not in registry:
        yield Fault(f"{where}.name", unknown(registry, name))
        return
    clash = sorted(registry.options(name).keys() & own.model_fields.keys())
    if clash:
        entry = registry.entry(name)
        yield Fault(
            f"{where}.name",
            f"{registry.kind} {name!r} ({entry.place}): its option {clash[0]!r} has the name of a key of {where}; "
            "rename it",
        )
        return
    given = {key: value for key, value in tree.items() if key not in own.model_fields}
    options, faults = checked_options(registry, name, given, where)
    tree.update(options)
    yield from faults


def checked_options(
    registry: Registry[Any], name: str, given: Mapping[str, Any], where: str
) -> tuple[dict[str, Any], list[Fault]]:
    """Return the options of an entry, defaults included, as plain values, and the faults of those that were given."""
    parameters = registry.options(name)
    faults = [_foreign(registry, name, key, where) for key in given if key not in parameters]
    model = _model(registry, name)
    try:
        # As JSON, which has neither tuples nor paths: a list may stand for the one, and text for the other.
        values = _defaults(registry, name) | {key: given[key] for key in given if key in parameters}
        checked = model.model_validate_json(json.dumps(values))
    except ValidationError as error:
        return dict(given), [*faults, *(Fault.of(each, where) for each in error.errors(include_url=False))]
    return checked.model_dump(mode="json"), faults


def _model(registry: Registry[Any], name: str) -> type[Section]:
    fields: dict[str, Any] = {
        option: (_annotation(registry, name, parameter), ...) for option, parameter in registry.options(name).items()
    }
    return create_model(f"{registry.kind} {name}", __base__=Section, **fields)


def _defaults(registry: Registry[Any], name: str) -> dict[str, Any]:
    """Return the defaults of an entry's options as plain values, which are held to the annotations like given ones."""
    defaults: dict[str, Any] = {}
    for option, parameter in registry.options(name).items():
        if parameter.default is inspect.Parameter.empty:
            continue
        try:
            defaults[option] = to_jsonable_python(parameter.default)
        except PydanticSerializationError as error:
            raise RecipeError(
                f"{registry.kind} {name!r} ({registry.entry(name).place}): the default of its option {option!r}, "
                f"{parameter.default!r}, cannot be written in a recipe; take it as a name, a number or a list of them"
            ) from error
    return defaults


def _annotation(registry: Registry[Any], name: str, option: inspect.Parameter) -> Any:
    """Return an option's annotation as an object, with what ``Annotated`` says of a value's range.

    Annotations may be text. Those of the other parameters are left alone: what they name may be imported for type
    checkers only.
    """
    if option.annotation is inspect.Parameter.empty:
        return Any
    function = inspect.unwrap(registry.callable(name))
    holder = types.SimpleNamespace(__annotations__={option.name: option.annotation})
    try:
        return typing.get_type_hints(holder, globalns=getattr(function, "__globals__", {}), include_extras=True)[
            option.name
        ]
    except NameError as error:
        place = registry.entry(name).place
        raise RecipeError(
            f"{registry.kind} {name!r} ({place}): the annotation {option.annotation!r} of its option {option.name!r} "
            f"cannot be resolved ({error}); import what it names at run time, too"
        ) from error


def _foreign(registry: Registry[Any], name: str, key: str, where: str) -> Fault:
    known = tuple(registry.options(name))
    others = [other for other in registry.names() if other != name and key in registry.options(other)]
    hint = f"; it is an option of {', '.join(others)}" if others else nearest(key, known)
    return Fault(f"{where}.{key}", f"{registry.kind} {name!r} takes no option {key!r}{hint}")
