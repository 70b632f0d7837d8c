# SPDX-License-Identifier: Apache-2.0
"""Sections with a ``name``, which also take the options of the registry entry of that name.

The entry's keyword-only parameters, with their annotations and defaults, are the schema; each default exists once.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ConfigDict, ValidationError, create_model

from megatron_g2rpo.recipe.base import Section, Text
from megatron_g2rpo.recipe.errors import Fault
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
        yield Fault(f"{where}.name", registry.unknown(name))
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
        checked = model.model_validate({key: value for key, value in given.items() if key in parameters})
    except ValidationError as error:
        return dict(given), [*faults, *(Fault.of(each, where) for each in error.errors(include_url=False))]
    return checked.model_dump(mode="json"), faults


def _model(registry: Registry[Any], name: str) -> type[Section]:
    # As objects, with what Annotated says of a value's range: annotations may be text.
    hints = typing.get_type_hints(registry.callable(name), include_extras=True)
    fields: dict[str, Any] = {
        option: (hints.get(option, Any), ... if parameter.default is inspect.Parameter.empty else parameter.default)
        for option, parameter in registry.options(name).items()
    }
    return create_model(f"{registry.kind} {name}", __base__=Section, **fields)


def _foreign(registry: Registry[Any], name: str, key: str, where: str) -> Fault:
    known = tuple(registry.options(name))
    others = [other for other in registry.names() if other != name and key in registry.options(other)]
    hint = f"; it is an option of {', '.join(others)}" if others else nearest(key, known)
    return Fault(f"{where}.{key}", f"{registry.kind} {name!r} takes no option {key!r}{hint}")
