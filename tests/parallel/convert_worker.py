# SPDX-License-Identifier: Apache-2.0
"""One rank of the conversion test: models through a Megatron checkpoint and back, at other layouts on either side.

Usage: DIRECTORY LAYOUT>LAYOUT..., a layout as tp,pp,cp. The directory holds a model a folder; each goes through each
pair of layouts: imported at the first, then exported twice, from the checkpoint's files, which needs no layout, and
from a policy that loaded it at the second. The last model goes once more with a wrong table, which must be detected,
and the first onto a full disk.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from safetensors import safe_open
from torch import Tensor

from megatron_g2rpo import recipe as recipes
from megatron_g2rpo import weights
from megatron_g2rpo.commands.convert.common import precision_of
from megatron_g2rpo.commands.convert.export_hf import export, model_files
from megatron_g2rpo.commands.convert.import_hf import import_hf
from megatron_g2rpo.models.dense_decoder import DenseDecoder
from megatron_g2rpo.policy import process_groups
from megatron_g2rpo.policy.device import init_process_group
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.recipe import Recipe
from megatron_g2rpo.train.run.checkpoint_writing import CheckpointWriteError
from megatron_g2rpo.weights.megatron_checkpoint import MegatronCheckpoint
from megatron_g2rpo.weights.table import WeightTable
from tests.common.hardware import layer_overrides, this_device
from tests.common.launch import report_result
from tests.common.recipes import SFT

SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")


def recipe_of(layout: str, precision: str, **policy: object) -> Recipe:
    process_groups.reset()
    overrides = [f"policy.megatron_cfg.{key}={size}" for key, size in zip(SIZES, layout.split(","), strict=True)]
    overrides += [f"policy.{key}={value}" for key, value in {**policy, "precision": precision}.items()]
    overrides += [f"policy.megatron_cfg.{key}={value}" for key, value in layer_overrides("auto", precision).items()]
    overrides += [f"cluster.gpus_per_node={dist.get_world_size()}", f"cluster.device={this_device().kind}"]
    return recipes.load(SFT, overrides, "sft")


def tensors_of(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    return found


def round_trip(model: Path, pair: str) -> list[dict[str, Tensor]]:
    """The tensors of both exports; on rank 0."""
    first, second = pair.split(">")
    checkpoint, exported, streamed = (model.parent / name for name in ("checkpoint", "exported", "streamed"))
    if dist.get_rank() == 0:
        for left in (checkpoint, exported, streamed):
            shutil.rmtree(left, ignore_errors=True)
    dist.barrier()
    precision = precision_of(weights.SafetensorsDirectory(model).dtypes, model)
    import_hf(recipe_of(first, precision, model_name=model), checkpoint)
    assert precision_of(MegatronCheckpoint(checkpoint).dtypes, checkpoint) == precision
    directory = model_files(checkpoint, None)
    export(MegatronCheckpoint(checkpoint), exported, source=directory, dtype=precision, max_shard_size="60KB")

    recipe = recipe_of(second, precision, model_name=directory, pretrained_checkpoint=checkpoint)
    torch.use_deterministic_algorithms(True)  # fills what is not initialised with nan
    policy = MegatronPolicy(recipe.policy, this_device(), seed=0, max_steps=None)
    torch.use_deterministic_algorithms(False)
    for name, parameter in policy.model.named_parameters():
        assert parameter.isfinite().all(), f"{model.name}, {pair}: {name}"  # the vocabulary's padding among them
    weights.export_hf(
        policy.stream(),
        policy.specs(),
        streamed,
        source=directory,
        write=dist.get_rank() == 0,
        max_shard_size="60KB",
    )
    dist.barrier()
    assert sorted(path.name for path in model.parent.iterdir() if "partial" in path.name) == []
    return [tensors_of(exported), tensors_of(streamed)] if dist.get_rank() == 0 else []


def check(model: Path, pair: str) -> int:
    """The number of tensors that came back; of rank 0, which reads the files."""
    both = round_trip(model, pair)
    if dist.get_rank() > 0:
        return 0
    expected = tensors_of(model)
    for how, found in zip(("files", "policy"), both, strict=True):
        assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype, name
            assert torch.equal(found[name], tensor), f"{model.name}, {pair}, from {how}: {name}"
    exported = model.parent / "exported"
    index = json.loads((exported / "model.safetensors.index.json").read_text())["weight_map"]
    shards = {path.name for path in exported.glob("model-*.safetensors")}
    assert index.keys() == expected.keys()
    size = sum(tensor.numel() * tensor.element_size() for tensor in expected.values())
    assert json.loads((exported / "model.safetensors.index.json").read_text())["metadata"]["total_size"] == size
    assert set(index.values()) == shards
    assert len(shards) > dist.get_world_size(), "every rank writes some"
    return len(expected)


def check_a_swapped_row_is_detected(model: Path, pair: str) -> int:
    """Gate and up have the same shape: a table that swaps them loads and exports without an error.

    The number of tensors that differ; of rank 0.
    """
    table_of = DenseDecoder.weights

    def swapped(family: DenseDecoder, hf_config: object) -> WeightTable:
        table = table_of(family, hf_config)
        rows = [replace(row, hf=row.hf[::-1]) if "linear_fc1.weight" in row.megatron else row for row in table.rows]
        return WeightTable(rows, table.ignored)

    # For the way in alone: both ways, the mistake would undo itself.
    tables = iter([swapped, table_of, table_of])
    with patch.object(DenseDecoder, "weights", lambda family, hf_config: next(tables)(family, hf_config)):
        both = round_trip(model, pair)
    if dist.get_rank() > 0:
        return 0
    expected = tensors_of(model)
    swapped_names = {name for name in expected if "gate_proj" in name or "up_proj" in name}
    for found in both:
        assert {name for name, tensor in expected.items() if not torch.equal(found[name], tensor)} == swapped_names
    return len(swapped_names)


def error_on_a_full_disk(model: Path) -> str:
    """What an import says on every rank when the last rank's disk is full, which /dev/full always is."""
    target, save = model.parent / "full", dist_checkpointing.save

    def save_to_full_disk(*arguments: object, checkpoint_dir: str, **options: object) -> object:
        if dist.get_rank() == dist.get_world_size() - 1:
            for number in range(4):  # more files than a rank writes
                Path(checkpoint_dir, f"__{dist.get_rank()}_{number}.distcp").symlink_to("/dev/full")
        return save(*arguments, checkpoint_dir=checkpoint_dir, **options)

    layout = f"{dist.get_world_size()},1,1"
    with patch.object(dist_checkpointing, "save", save_to_full_disk):
        try:
            import_hf(recipe_of(layout, "float32", model_name=model), target)
        except CheckpointWriteError as error:
            dist.barrier()
            assert not target.exists()
            assert not weights.partial_path(target).exists()
            return str(error)
    raise AssertionError("a full disk went unnoticed")


def main() -> None:
    init_process_group(this_device())
    directory, pairs = Path(sys.argv[1]), sys.argv[2:]
    models = sorted(path for path in directory.iterdir() if (path / "config.json").is_file())
    tensors = {model.name: {pair: check(model, pair) for pair in pairs} for model in models}
    swapped = check_a_swapped_row_is_detected(models[-1], pairs[0])
    report_result({"tensors": tensors, "swapped": swapped, "full": error_on_a_full_disk(models[0])})


if __name__ == "__main__":
    main()
