# SPDX-License-Identifier: Apache-2.0
"""Finds the directory of ``policy.model_name`` on this machine."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError


def local_model_dir(name: str, only: str | None = None) -> Path:
    """Return the directory of a model: the path itself, or the hub's snapshot, downloaded if it is not cached.

    Args:
        name: a directory, or the name of a model on the Hugging Face hub.
        only: the one file to download; None for all of them.

    Raises:
        FileNotFoundError: ``name`` is neither a directory nor a model that the hub gives.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name)) if only is None else Path(hf_hub_download(name, only)).parent
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"policy.model_name: {name} is neither a directory nor a model that the Hugging Face hub gives ({error})"
        ) from error
