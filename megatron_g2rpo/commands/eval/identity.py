# SPDX-License-Identifier: Apache-2.0
"""What makes two evaluations the same: the model's files, the data, how is sampled, how answers are read and scored.

``evaluation.json`` holds it. An interrupted evaluation goes on if it is the same, and two can be told apart by it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_g2rpo.commands.eval.answers_file import ANSWERS, UNUSABLE, EvaluationError
from megatron_g2rpo.recipe import Recipe, flatten
from megatron_g2rpo.train.run.fresh import move_aside
from megatron_g2rpo.weights import SafetensorsDirectory
from megatron_g2rpo.weights.ownership import MARKER

EVALUATION = "evaluation.json"
SHOWN_DIFFERENCES = 5

# Beside the weights.
_MODEL_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
# Of `policy.generation`: they decide how fast is generated, or are for training; those of validation are in `sampling`.
_OF_SPEED = {"batch_size", "gap_warning", "vllm_cfg", "vllm_server_cfg"}
_OF_SAMPLING = {"temperature", "top_k", "top_p", "min_p", "stop_strings"}
_NOT_GENERATION = _OF_SPEED | _OF_SAMPLING | {f"val_{name}" for name in _OF_SAMPLING}
_OF_DATA = ("min_pixels", "max_pixels", "system_prompt", "response_format", "format_instruction")

Identity = dict[str, Any]


def identity_of(recipe: Recipe, *, data: str, limit: int | None, tasks: tuple[str, ...], sampling: Any) -> Identity:
    """Flat key -> value of all that an answer or its score depends on; JSON throughout.

    Args:
        recipe: the recipe, whose ``policy.model_name`` is a directory; its files are hashed.
        data: fingerprint of the dataset.
        limit: the largest number of samples of each task.
        tasks: the tasks of the dataset; what the recipe says of others does not count.
        sampling: the fields of ``Sampling``, number of samples and seed.
    """
    tree = recipe.model_dump(mode="json")
    generation = {key: value for key, value in tree["policy"]["generation"].items() if key not in _NOT_GENERATION}
    of_tasks = {name: {k: v for k, v in tree["env"]["tasks"][name].items() if k != "entropy"} for name in tasks}
    everything = {
        "megatron_g2rpo": version("megatron-g2rpo"),
        "model": fingerprint(Path(recipe.policy.model_name)),
        "data": {"fingerprint": data, "limit": limit},
        "sampling": sampling,
        "policy": {
            "precision": recipe.policy.precision,
            "max_total_sequence_length": recipe.policy.max_total_sequence_length,
            "generation": generation,
        },
        "prompts": {key: tree["data"][key] for key in _OF_DATA},
        "env": {**{key: tree["env"][key] for key in ("reward_weights", "reward_options")}, "tasks": of_tasks},
        "imports": {name: _sha256(Path(name)) for name in recipe.imports if Path(name).is_file()},
    }
    return json.loads(json.dumps(flatten(everything)))


def fingerprint(model: Path) -> str:
    """Hex digest of the content of a Hugging Face directory: weights, configuration, tokenizer, chat template.

    Safetensors files that are not the model's do not count, see ``SafetensorsDirectory``.

    Raises:
        CheckpointError: the weights cannot be used.
    """
    beside = {path for pattern in _MODEL_FILES for path in model.glob(pattern) if path.is_file()}
    files = sorted({*beside, *SafetensorsDirectory(model).files} - {model / MARKER})
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing releases the interpreter
        digests = list(pool.map(_sha256, files))
    named = [f"{path.name} {digest}\n" for path, digest in zip(files, digests, strict=True)]
    return hashlib.sha256("".join(named).encode()).hexdigest()


def claim(directory: Path, identity: Identity, origin: Mapping[str, str], *, fresh: bool) -> None:
    """Make a directory that of an evaluation: a new one, an empty one, or one of the same evaluation, which goes on.

    Args:
        directory: the directory.
        identity: the evaluation.
        origin: where model, data and recipe lie; for readers, it may change.
        fresh: rename the directory of an earlier evaluation; nothing is deleted.

    Raises:
        EvaluationError: the directory holds another evaluation (what differs is named), or files of something else.
    """
    path = directory / EVALUATION
    if not path.exists() and directory.exists() and any(directory.iterdir()):
        raise EvaluationError(f"--out {directory} holds files, but no {EVALUATION}: no evaluation; name another")
    if fresh:
        move_aside(directory)
    elif path.exists() and any((directory / name).exists() for name in (ANSWERS, UNUSABLE)):
        differ = differences(load(directory), identity)
        if differ:
            shown = "; ".join(differ[:SHOWN_DIFFERENCES])
            more = f" and {len(differ) - SHOWN_DIFFERENCES} more" if len(differ) > SHOWN_DIFFERENCES else ""
            raise EvaluationError(
                f"{directory} holds another evaluation ({shown}{more}); name another with --out, or pass --fresh to "
                "move that one aside"
            )
    directory.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"origin": dict(origin), "identity": identity}, indent=2) + "\n")
    partial.rename(path)


def load(directory: Path) -> Identity:
    """Read the identity of an evaluation on file.

    Raises:
        EvaluationError: the directory holds none.
    """
    path = directory / EVALUATION
    try:
        identity = json.loads(path.read_text())["identity"]
    except OSError as error:
        raise EvaluationError(
            f"{path} cannot be read ({error.strerror}): name the directory of an evaluation"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"{path}: not what an evaluation writes ({error})") from error
    return identity


def differences(theirs: Identity, mine: Identity) -> list[str]:
    """What differs between an evaluation on file and another one, a line each, sorted by key."""
    keys = sorted(key for key in theirs.keys() | mine.keys() if theirs.get(key) != mine.get(key))
    return [f"{key}: {_short(theirs.get(key))} there, {_short(mine.get(key))} here" for key in keys]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
