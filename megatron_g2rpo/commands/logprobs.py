# SPDX-License-Identifier: Apache-2.0
"""``megatron-g2rpo logprobs``: log-probabilities and entropies of given responses under the policy, at any layout."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_g2rpo.data.chat_text import checked_messages
from megatron_g2rpo.data.errors import DataError
from megatron_g2rpo.data.images import read_image
from megatron_g2rpo.data.packing import PackSequence, response_values
from megatron_g2rpo.data.processing import ChatProcessor
from megatron_g2rpo.policy.device import select, set_cpu_threads
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.recipe import Policy, Recipe
from megatron_g2rpo.train.assembly import packer_for

# Lines whose results are held at once; sequences are packed within a chunk.
CHUNK_LINES = 256


def logprobs(recipe: Recipe, source: Path, target: Path) -> int:
    """Write the log-probabilities and entropies of the response tokens of every line, in order. A collective.

    Each line of the input is ``{"prompt": [chat messages], "images": [paths], "response": "text"}``; paths are relative
    to the file. Each line of the output is ``{"token_ids": [...], "logprobs": [...], "entropies": [...]}`` of the
    response and its end-of-turn token, at ``policy.generation.temperature``, in nats.

    Data-parallel ranks share the lines of a chunk; rank 0 writes. The output appears when it is complete.

    Args:
        recipe: the recipe, of which ``policy``, ``data`` (pixel bounds) and ``cluster`` are read.
        source: the file to read.
        target: the file to write.

    Returns:
        The number of lines.

    Raises:
        DataError: the input holds a line that cannot be used; the message begins with file and line.
    """
    device = select(recipe.cluster.device)
    if device.kind == "cpu":
        set_cpu_threads(recipe.cluster.gpus_per_node)
    processor = ChatProcessor(recipe.policy.model_name, recipe.data.min_pixels, recipe.data.max_pixels)
    records = [_parse(line, f"{source}:{number}") for number, line in _lines(source)]
    policy = MegatronPolicy(recipe.policy, device, seed=0, max_steps=None)
    partial = target.with_name(target.name + ".partial")
    writes = dist.get_rank() == 0
    if writes:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text("")
    for start in range(0, len(records), CHUNK_LINES):
        results = _chunk(recipe.policy, policy, processor, records[start : start + CHUNK_LINES], source.parent)
        if writes:
            with partial.open("a") as file:
                file.writelines(json.dumps(result) + "\n" for result in results)
    if writes:
        partial.rename(target)
    return len(records)


def _chunk(
    settings: Policy, policy: MegatronPolicy, processor: ChatProcessor, records: list[dict[str, Any]], base: Path
) -> list[dict[str, Any]]:
    groups = policy.groups
    own = range(groups.data_rank, len(records), groups.data_size)
    budget = settings.sequence_packing.train_mb_tokens
    sequences = [_sequence(processor, records[index], base, budget) for index in own]
    results: dict[int, dict[str, Any]] = {}
    if sequences:
        batches = packer_for(processor, policy.layout, settings.sequence_packing).pack(sequences, budget)
        for batch, stats in zip(batches, policy.logprobs(batches, settings.generation.temperature), strict=True):
            logprob, entropy = response_values(batch, stats.logprobs), response_values(batch, stats.entropy)
            for number in logprob:
                results[own[number]] = {
                    "token_ids": sequences[number].response_ids.tolist(),
                    "logprobs": logprob[number].tolist(),
                    "entropies": entropy[number].tolist(),
                }
    gathered: list[dict[int, dict[str, Any]]] = [{} for _ in range(groups.data_size)]
    dist.all_gather_object(gathered, results, group=groups.data)
    everything = {index: result for share in gathered for index, result in share.items()}
    for index, record in enumerate(records):
        if not all(map(math.isfinite, everything[index]["logprobs"])):
            raise DataError(f"{record['where']}: log-probabilities are not finite; the model's weights hold NaN or Inf")
    return [everything[index] for index in range(len(records))]


def _lines(source: Path) -> Iterator[tuple[int, str]]:
    if not source.exists():
        raise DataError(f"{source} does not exist")
    try:
        text = source.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{source} cannot be read: {error}") from error
    for number, line in enumerate(text.split("\n"), start=1):  # not at the other line ends that a text may contain
        if line.strip():
            yield number, line


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from error
    if not _is_record(record):
        raise DataError(f'{where}: expected {{"prompt": [chat messages], "images": [paths], "response": "text"}}')
    checked_messages(record["prompt"], where)
    return {**record, "where": where}


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict) or not isinstance(record.get("response"), str):
        return False
    images = record.get("images") or []
    return (
        isinstance(record.get("prompt"), list)
        and isinstance(images, list)
        and all(isinstance(path, str) and path.isprintable() for path in images)
    )


def _sequence(processor: ChatProcessor, record: dict[str, Any], base: Path, budget: int) -> PackSequence:
    where, images = record["where"], []
    for path in record.get("images") or []:
        try:
            data = (base / path).read_bytes()
        except OSError as error:
            raise DataError(f"{where}: image {base / path} cannot be read ({error.strerror})") from error
        images.append(read_image(data, f"{where}: image {base / path}"))
    sequence = PackSequence(
        inputs=processor.encode(record["prompt"], images, name=where),
        response_ids=processor.encode_response(record["response"], name=where),
    )
    if sequence.length > budget:
        raise DataError(
            f"{where}: prompt and response have {sequence.length} tokens, more than "
            f"policy.sequence_packing.train_mb_tokens ({budget}); raise it"
        )
    return sequence
