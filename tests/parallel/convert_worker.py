# SPDX-License-Identifier: Apache-2.0
"""One rank of the conversion test: models through a Megatron checkpoint and back, at other layouts on either side.

Usage: DIRECTORY LAYOUT>LAYOUT..., a layout as tp,pp,cp. The directory holds a model a folder; each goes through each
pair of layouts. The last model goes through once more with a wrong table, which must be seen.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from megatron_g2rpo import recipe as recipes
from megatron_g2rpo import weights
from megatron_g2rpo.policy import parallel
from megatron_g2rpo.policy.device import init_process_group, select
from megatron_g2rpo.recipe import Recipe
from megatron_g2rpo.train import convert
from megatron_g2rpo.weights.table import WeightTable

SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")


def recipe_of(layout: str, precision: str, **policy: object) -> Recipe:
    parallel.reset()
    overrides = [f"policy.megatron_cfg.{key}={size}" for key, size in zip(SIZES, layout.split(","), strict=True)]
    overrides += [f"policy.{key}={value}" for key, value in {**policy, "precision": precision}.items()]
    overrides += [f"cluster.gpus_per_node={dist.get_world_size()}", "cluster.device=cpu"]
    return recipes.load(recipes.EXEMPLARS / "vlm_sft.yaml", overrides, "sft")


def tensors_of(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    return found


def round_trip(model: Path, pair: str) -> dict[str, Tensor]:
    """The exported tensors; on rank 0."""
    first, second = pair.split(">")
    checkpoint, exported = model.parent / "checkpoint", model.parent / "exported"
    if dist.get_rank() == 0:
        for left in (checkpoint, exported):
            shutil.rmtree(left, ignore_errors=True)
    dist.barrier()
    precision = convert.precision_of_hf(model)
    convert.import_hf(recipe_of(first, precision, model_name=model), checkpoint)
    assert convert.precision_of_checkpoint(checkpoint) == precision
    companions = convert.companions(checkpoint, None)
    recipe = recipe_of(second, precision, model_name=companions, pretrained_checkpoint=checkpoint)
    convert.export(recipe, exported, dtype=precision, max_shard_size="60KB")
    dist.barrier()
    assert sorted(path.name for path in model.parent.iterdir() if "partial" in path.name) == []
    return tensors_of(exported) if dist.get_rank() == 0 else {}


def check(model: Path, pair: str) -> None:
    found = round_trip(model, pair)
    if dist.get_rank() > 0:
        return
    expected = tensors_of(model)
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), f"{model.name}, {pair}: {name}"
    shards = len(list((model.parent / "exported").glob("model-*.safetensors")))
    assert shards > 1
    print(f"converted {model.name} {pair}: {len(found)} tensors in {shards} files", flush=True)


def check_a_swapped_row_is_seen(model: Path, pair: str) -> None:
    """Gate and up have the same shape: a table that swaps them loads and exports without an error."""
    table_for = weights.table_for

    def swapped(hf_config: object) -> WeightTable:
        table = table_for(hf_config)
        rows = [replace(row, hf=row.hf[::-1]) if "linear_fc1.weight" in row.megatron else row for row in table.rows]
        return WeightTable(rows, table.ignored)

    tables = iter([swapped, table_for])  # for the way in alone: both ways, the mistake would undo itself
    with patch.object(weights, "table_for", lambda hf_config: next(tables)(hf_config)):
        found = round_trip(model, pair)
    if dist.get_rank() == 0:
        expected = tensors_of(model)
        differing = {name for name, tensor in expected.items() if not torch.equal(found[name], tensor)}
        assert differing == {name for name in expected if "gate_proj" in name or "up_proj" in name}
        print("a swapped row is seen", flush=True)


def main() -> None:
    init_process_group(select("cpu"))
    directory, pairs = Path(sys.argv[1]), sys.argv[2:]
    models = sorted(path for path in directory.iterdir() if (path / "config.json").is_file())
    for model in models:
        for pair in pairs:
            check(model, pair)
    check_a_swapped_row_is_seen(models[-1], pairs[0])


if __name__ == "__main__":
    main()
