# SPDX-License-Identifier: Apache-2.0
"""Claims: a checkpoint's tensors come out whole, by layer, or not at all; what does not fit the model is listed.

The checkpoints are written here by torch, in the form that megatron-core gives them; real ones go through
tests/parallel/test_convert.py.
"""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from megatron_g2rpo.commands.convert.export_hf import export
from megatron_g2rpo.policy import checkpoint_reading
from megatron_g2rpo.weights import CheckpointError, SafetensorsDirectory
from megatron_g2rpo.weights.checkpoint_metadata import COMMON, METADATA, TENSORS, read_metadata
from megatron_g2rpo.weights.hf_model import published_tensors
from megatron_g2rpo.weights.megatron_checkpoint import MegatronCheckpoint, hf_contents
from tests.common.text_models import make_text_model
from tests.common.tiny_model import table_for

LAYER = "language_model.decoder.layers."


def write(directory: Path, tensors: dict[str, Tensor], backend: str = "torch_dist") -> Path:
    dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(directory), no_dist=True)
    (directory / METADATA).write_text(json.dumps({"sharded_backend": backend}))
    torch.save({}, directory / COMMON)
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Llama: its directory and its configuration."""
    directory = tmp_path_factory.mktemp("llama")
    return directory, make_text_model(directory, "llama", tied=True).config


def stored(model, *, engine: bool = False, stacked: bool = True) -> dict[str, Tensor]:
    """The model as a checkpoint holds it, with the norms' names of Transformer Engine's linears or the local ones."""
    directory, config = model
    tensors, table = SafetensorsDirectory(directory), table_for(config)
    whole = {
        name: entry.rule.shard([tensors[hf] for hf in entry.hf_names], 0, 1)
        for name, entry in table.parameters(tensors)
    }
    if engine:
        moved = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
        moved["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
        for old, new in moved.items():
            whole = {name.replace(old, new): tensor for name, tensor in whole.items()}
    if not stacked:
        return whole
    layers = config.num_hidden_layers
    result = {name: tensor for name, tensor in whole.items() if LAYER not in name}
    for kind in {name.removeprefix(f"{LAYER}0.") for name in whole if name.startswith(f"{LAYER}0.")}:
        result[LAYER + kind] = torch.stack([whole[f"{LAYER}{layer}.{kind}"] for layer in range(layers)])
    return result


@pytest.mark.parametrize("engine", [False, True], ids=["local", "transformer engine"])
@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "by layer"])
def test_every_form_exports_the_same(model, tmp_path, engine, stacked):
    directory, _ = model
    tensors = stored(model, engine=engine, stacked=stacked)
    others = {f"optimizer.state.exp_avg.{name}": torch.ones_like(tensor) for name, tensor in tensors.items()}
    others["fp8.hybrid.layers.0.mlp.linear_fc1.scaling_fwd.scale"] = torch.ones(3)
    checkpoint = write(tmp_path / "checkpoint", {**tensors, **others, "rng": {"state": [1, 2]}})
    options = {"source": directory, "dtype": "float32", "max_shard_size": "5GB"}
    export(MegatronCheckpoint(checkpoint), tmp_path / "hf", **options)
    found, expected = load_file(tmp_path / "hf" / "model.safetensors"), load_file(directory / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_all_that_does_not_fit_is_listed_and_nothing_is_left(model, tmp_path):
    directory, config = model
    tensors = stored(model)
    del tensors["language_model.decoder.final_layernorm.weight"]
    embedding = "language_model.embedding.word_embeddings.weight"
    tensors[embedding] = tensors[embedding][:, :-1].contiguous()
    qkv = f"{LAYER}self_attention.linear_qkv.weight"
    tensors[qkv] = tensors[qkv][:, :-1].contiguous()
    tensors["language_model.adapter.weight"] = torch.zeros(3)
    down = f"{LAYER}mlp.linear_fc2.weight"
    tensors[down] = torch.cat([tensors[down], tensors[down][:1]])  # a layer too many
    checkpoint = write(tmp_path / "checkpoint", tensors)
    with pytest.raises(CheckpointError) as error:
        export(
            MegatronCheckpoint(checkpoint),
            tmp_path / "hf",
            source=directory,
            dtype="float32",
            max_shard_size="5GB",
        )
    first, *lines = str(error.value).splitlines()
    layers, hidden = config.num_hidden_layers, config.hidden_size
    rows = tensors[qkv].shape[1]
    assert first == f"{checkpoint}: the weights do not fit config.json in {len(lines)} places:"
    assert sorted(line.strip() for line in lines) == sorted(
        [
            "missing: model.norm.weight",
            f"shape {(config.vocab_size, hidden - 1)} instead of {(config.vocab_size, hidden)}: "
            "model.embed_tokens.weight",
            "fits no tensor: language_model.adapter.weight",
            f"fits no tensor: model.layers.{layers}.mlp.down_proj.weight",
        ]
        + [f"shape {(rows, hidden)}: {LAYER}{n}.self_attention.linear_qkv.weight" for n in range(layers)]
        + [f"missing: model.layers.{n}.self_attn.{part}_proj.weight" for n in range(layers) for part in "qkv"]
    )
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_tensor_under_both_names_is_refused(model, tmp_path):
    tensors = {**stored(model), **stored(model, engine=True)}
    checkpoint = MegatronCheckpoint(write(tmp_path, tensors))
    config = model[1]
    with pytest.raises(CheckpointError) as error:
        hf_contents(checkpoint, table_for(config), published_tensors(config))
    assert str(error.value).count("is there twice: ") == 2 * config.num_hidden_layers


def test_a_vocabulary_that_is_larger_than_the_model_s_is_refused(model, tmp_path):
    """Its last rows would be lost as if they were padding."""
    tensors, (_, config) = stored(model), model
    embedding = "language_model.embedding.word_embeddings.weight"
    tensors[embedding] = torch.cat([tensors[embedding], tensors[embedding][:3]])
    checkpoint = MegatronCheckpoint(write(tmp_path, tensors))
    rows = config.vocab_size
    with pytest.raises(CheckpointError, match=f"{rows + 3} rows instead of {rows}, padding included: {embedding}"):
        hf_contents(checkpoint, table_for(config), published_tensors(config))


def test_a_tensor_that_lacks_a_piece_is_refused(model, tmp_path):
    """As of a job whose ranks did not all write theirs: what is missing would be whatever the memory held."""
    checkpoint = MegatronCheckpoint(write(tmp_path, stored(model)))
    key = f"{LAYER}mlp.linear_fc2.weight"
    (whole,) = checkpoint._stored[key].chunks
    layers, rows, columns = whole.sizes
    checkpoint._stored[key].chunks[:] = [ChunkStorageMetadata(whole.offsets, torch.Size([layers, rows - 1, columns]))]
    name = f"{LAYER}1.mlp.linear_fc2.weight"
    with pytest.raises(CheckpointError, match=f"it does not have all of {name}"):
        checkpoint[name]


def test_a_file_that_was_cut_short_is_named_with_the_tensor(model, tmp_path):
    checkpoint = MegatronCheckpoint(write(tmp_path, stored(model)))
    for file in tmp_path.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    name = "language_model.decoder.final_layernorm.weight"
    assert name in checkpoint, "its names do not come from there"
    with pytest.raises(CheckpointError, match=f"{name} cannot be read, a file of it is damaged "):
        checkpoint[name]


def test_what_is_no_checkpoint_is_named(model, tmp_path):
    with pytest.raises(CheckpointError, match=r"is no Megatron checkpoint: it has no metadata\.json"):
        MegatronCheckpoint(tmp_path)
    write(tmp_path, {"w": torch.ones(1)}, backend="zarr")
    with pytest.raises(CheckpointError, match=r"its format is 'zarr'; 'torch_dist' is the one that is read"):
        MegatronCheckpoint(tmp_path)


class Payload:
    """What a pickle can do: it makes a file as it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("route", ["export", "policy", "entry"])
def test_code_in_a_checkpoint_is_not_run(model, tmp_path, route, monkeypatch):
    """In the list of tensors, which exports and runs read, and in an entry that is no tensor."""
    ran = tmp_path / "ran"
    state = stored(model)
    if route == "entry":
        state["loop"] = Payload(ran)
    checkpoint = write(tmp_path / "checkpoint", state)
    assert not ran.exists(), "writing does not run it"
    if route != "entry":
        path = checkpoint / TENSORS
        metadata = pickle.loads(path.read_bytes())
        metadata.planner_data = Payload(ran)
        path.write_bytes(pickle.dumps(metadata))
        with pytest.raises(CheckpointError, match=rf"{path} is not to be trusted: it names posix\.mkdir"):
            MegatronCheckpoint(checkpoint) if route == "export" else checkpoint_reading.load({}, checkpoint)
    else:
        target = {"loop": None}
        monkeypatch.setattr(
            checkpoint_reading.dist_checkpointing,
            "load",
            lambda sharded_state_dict, checkpoint_dir: dcp.load(sharded_state_dict, checkpoint_id=checkpoint_dir),
        )
        with pytest.raises(CheckpointError, match=f"{checkpoint} cannot be read: rank 0: .*Weights only load failed"):
            checkpoint_reading.load(target, checkpoint)
    assert not ran.exists()


def test_the_guard_would_notice(model, tmp_path):
    """Without it, torch's own reader runs the payload."""
    ran = tmp_path / "ran"
    path = write(tmp_path / "checkpoint", stored(model)) / TENSORS
    metadata = pickle.loads(path.read_bytes())
    metadata.planner_data = Payload(ran)
    path.write_bytes(pickle.dumps(metadata))
    dcp.FileSystemReader(path.parent).read_metadata()
    assert ran.exists()


def test_a_damaged_description_is_named(model, tmp_path):
    checkpoint = write(tmp_path, stored(model))
    whole = (checkpoint / TENSORS).read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"no pickle", pickle.dumps({"a": 1})):
        (checkpoint / TENSORS).write_bytes(broken)
        with pytest.raises(CheckpointError, match=rf"{checkpoint / TENSORS} is damaged"):
            MegatronCheckpoint(checkpoint)
    (checkpoint / TENSORS).unlink()
    with pytest.raises(
        CheckpointError, match=rf"{checkpoint / TENSORS} does not exist, so the checkpoint is not whole"
    ):
        read_metadata(checkpoint)
    for broken in ("{", "", "[]", "{}"):
        (checkpoint / METADATA).write_text(broken)
        with pytest.raises(CheckpointError, match=rf"{checkpoint / METADATA} is damaged"):
            MegatronCheckpoint(checkpoint)
