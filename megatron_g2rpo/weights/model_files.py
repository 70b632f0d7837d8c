# SPDX-License-Identifier: Apache-2.0
"""The files that a Hugging Face directory holds beside its weights: what they say, and copies of them.

An image processor's configuration is ``preprocessor_config.json``, or since transformers 5 the entry
``image_processor`` of ``processor_config.json``. transformers takes the entry where there are both (5.19,
``ImageProcessingMixin.get_image_processor_dict``), and so does what is here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_g2rpo.weights.ownership import MARKER
from megatron_g2rpo.weights.safetensors_directory import INDEX_NAME

IMAGE_PROCESSOR, PROCESSOR, GENERATION = "preprocessor_config.json", "processor_config.json", "generation_config.json"
# A tokenizer is one of these; others, such as merges.txt or tokenizer_config.json, go with one of them.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
TEMPLATES = "additional_chat_templates"
# Files that are copied beside the weights: configuration, tokenizer, processors, chat template, licence.
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "README.md")
# Of the weights themselves, and of who wrote them.
_OF_WEIGHTS = (INDEX_NAME, MARKER)
_NESTED = "image_processor"
# Where older directories state the bounds, beside ``size`` and above it.
_OLD_BOUNDS = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}


@dataclass(frozen=True)
class ProcessorSettings:
    """What a run's processor did otherwise than its model directory says, and an export of the run must say.

    Attributes:
        image_size: the image processor's ``size``, which holds the pixel bounds; None for a text-only model.
        eos_token_ids: the tokens that ended a response.
    """

    image_size: Mapping[str, int] | None
    eos_token_ids: tuple[int, ...]


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file that holds an object.

    Raises:
        ValueError: the file holds something else; names it.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no object; copy it again")
    return content


def image_processor_config(directory: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the file that configures a directory's image processor, and the configuration; None if there is none.

    Raises:
        ValueError: a file is not JSON; names it.
    """
    processor, alone = directory / PROCESSOR, directory / IMAGE_PROCESSOR
    if processor.is_file() and isinstance(nested := read_json(processor).get(_NESTED), dict):
        return processor, nested
    return (alone, read_json(alone)) if alone.is_file() else None


def has_tokenizer(directory: Path) -> bool:
    """Return whether a directory holds a tokenizer's vocabulary."""
    return any((directory / name).is_file() for name in TOKENIZERS)


def copy_model_files(source: str | Path, target: str | Path, settings: ProcessorSettings | None = None) -> None:
    """Copy the files that a Hugging Face directory holds beside its weights.

    Args:
        source, target: the directories.
        settings: what the copies must say of the run's processor, where the files say otherwise; None to leave them.
    """
    source, target = Path(source), Path(target)
    for pattern in _COPIED:
        for file in source.glob(pattern):
            if file.name not in _OF_WEIGHTS and file.is_file():
                shutil.copy2(file, target / file.name)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, target / TEMPLATES, dirs_exist_ok=True)
    if settings is not None:
        _set_image_size(target, settings.image_size)
        _set_eos_tokens(target, settings.eos_token_ids)


def _set_image_size(directory: Path, size: Mapping[str, int] | None) -> None:
    found = image_processor_config(directory)
    if size is None or found is None:
        return

    def change(tree: dict[str, Any]) -> None:
        config = tree[_NESTED] if found[0].name == PROCESSOR else tree
        config["size"] = dict(size)
        config.update({old: size[new] for old, new in _OLD_BOUNDS.items() if old in config and new in size})

    _rewrite(found[0], change)


def _set_eos_tokens(directory: Path, ids: tuple[int, ...]) -> None:
    path = directory / GENERATION
    if not path.is_file():
        if len(ids) > 1:  # else what ends a response is the tokenizer's own end token, as readers take it
            path.write_text(json.dumps({"eos_token_id": list(ids)}, indent=2) + "\n")
        return

    def change(tree: dict[str, Any]) -> None:
        stated = tree.get("eos_token_id")
        if set(stated if isinstance(stated, list) else [stated]) != set(ids):
            tree["eos_token_id"] = list(ids)

    _rewrite(path, change)


def _rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON file in place; one that says it all already keeps its bytes."""
    before, after = read_json(path), read_json(path)
    change(after)
    if after != before:
        path.write_text(json.dumps(after, indent=2, ensure_ascii=False) + "\n")
