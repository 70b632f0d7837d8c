# SPDX-License-Identifier: Apache-2.0
"""Finds the directory of ``policy.model_name`` on this machine, and reads its configuration."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from megatron_g2rpo.models.base import family


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


def load_config(directory: str | PathLike[str]) -> Any:
    """Return transformers' configuration of the model in a Hugging Face directory.

    Code that the directory holds (``auto_map``) is never run, nor does transformers ask whether to: a model whose
    family is unknown is refused before.

    Raises:
        FileNotFoundError: the directory has no config.json.
        ValueError: config.json cannot be read, or names a model family that is unknown.
    """
    from transformers import AutoConfig

    path = Path(directory) / "config.json"
    try:
        tree = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist: a Hugging Face model directory is needed") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); copy it again") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds no object; copy it again")
    try:
        family(str(tree.get("model_type", "")))
    except ValueError as error:
        own = "; the directory's own code (auto_map) is not run" if "auto_map" in tree else ""
        raise ValueError(f"{path}: {error}{own}") from error
    return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
