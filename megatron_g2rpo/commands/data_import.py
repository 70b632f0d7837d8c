# SPDX-License-Identifier: Apache-2.0
"""``megatron-g2rpo data import``: a dataset of another format, written as shards with an index."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_g2rpo import registry
from megatron_g2rpo.data.importers.base import import_dataset
from megatron_g2rpo.recipe.errors import RecipeError
from megatron_g2rpo.recipe.imports import as_written, import_all
from megatron_g2rpo.recipe.layers import parse_override
from megatron_g2rpo.recipe.named import checked_options


def run(source: Path, target: Path, importer: str, options: Sequence[str], imports: Sequence[str]) -> int:
    """Import a dataset.

    Args:
        source: what the importer reads.
        target: directory for the shards.
        importer: name of the importer.
        options: ``key=value`` each, values typed as in a recipe: the importer's keyword-only parameters.
        imports: modules or ``.py`` files with importers of the user's own.

    Returns:
        The number of samples.

    Raises:
        RecipeError: an unknown name or option, or an import that fails.
        DataError, SampleError: see ``import_dataset``.
    """
    import_all(as_written(list(imports), Path.cwd(), "--imports"), "--imports")
    if importer not in registry.importers:
        raise RecipeError(f"--importer: {registry.importers.unknown(importer)}")
    given = {key: value for option in options for key, value in parse_override(option).tree.items()}
    checked, faults = checked_options(registry.importers, importer, given, "importer")
    if faults:
        raise RecipeError("\n".join(fault.message for fault in faults))
    return import_dataset(registry.importers.bind(importer, **checked), source, target)
