# SPDX-License-Identifier: Apache-2.0
"""What this package registers itself, whatever other tests have registered in the same process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import megatron_g2rpo
from megatron_g2rpo.registry import Registry

PACKAGE = str(Path(megatron_g2rpo.__file__).parent)


def builtin_names(registry: Registry[Any]) -> set[str]:
    """The names of a registry's entries that were made in this package."""
    return {
        name
        for name in registry.names()
        if name in registry.on_demand or registry.entry(name).place.startswith(PACKAGE)
    }
