# SPDX-License-Identifier: Apache-2.0
"""Claims: what was loaded is what is streamed; a checkpoint or a parameter that does not fit is an error.

Over pipeline stages and tensor-parallel ranks: ``tests/parallel/test_weights_pipeline.py``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_g2rpo import weights
from megatron_g2rpo.weights.table import UnmappedParameter
from tests.common.tiny_model import make_tiny_qwen3vl, table_for
from tests.unit.weights.plain import plain_stage

NORM = "model.language_model.layers.2.input_layernorm.weight"


def tiny(tied: bool = True) -> tuple[weights.WeightTable, dict[str, Tensor]]:
    config, model = make_tiny_qwen3vl(tied=tied, vocab=163)
    return table_for(config), model.state_dict()


@pytest.mark.parametrize("transformer_engine", [False, True], ids=["local", "te"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_stream_is_what_was_loaded(tmp_path: Path, tied: bool, transformer_engine: bool) -> None:
    table, tensors = tiny(tied)
    model = plain_stage(table, tensors, transformer_engine=transformer_engine)
    # A tied matrix is stored once, as transformers does.
    stored = {name: tensor for name, tensor in tensors.items() if not (tied and name == "lm_head.weight")}
    save_file(stored, tmp_path / "model.safetensors")
    weights.load(
        model, table, weights.SafetensorsDirectory(tmp_path), tensor_rank=0, tensor_size=1, source=str(tmp_path)
    )
    streamed = list(weights.stream(model, table, tensor_group=None))
    assert sorted(name for name, _ in streamed) == sorted(stored)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in streamed)


def test_a_tied_checkpoint_may_store_the_embedding_twice() -> None:
    table, tensors = tiny(tied=True)
    assert "lm_head.weight" in tensors
    weights.load(plain_stage(table, tensors), table, tensors, tensor_rank=0, tensor_size=1, source="a test")


@pytest.mark.parametrize("norm", ["self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"])
def test_norms_inside_linears_are_never_skipped(norm: str) -> None:
    table, tensors = tiny()
    model = plain_stage(table, tensors, transformer_engine=True)
    without = weights.WeightTable([row for row in table.rows if not row.megatron.endswith(norm)], table.ignored)
    with pytest.raises(UnmappedParameter, match=norm):
        weights.load(model, without, tensors, tensor_rank=0, tensor_size=1, source="a test")
    with pytest.raises(UnmappedParameter, match=norm):
        list(weights.stream(model, without, tensor_group=None))


def test_all_that_does_not_fit_is_listed_before_anything_is_copied() -> None:
    table, tensors = tiny()
    model = plain_stage(table, tensors, tensor_size=1)
    key = "model.language_model.layers.1.self_attn.k_proj.weight"
    wrong = {name: tensor for name, tensor in tensors.items() if name != NORM}
    wrong |= {key: tensors[key][:3], "model.extra": torch.zeros(3), "model.more": torch.zeros(3)}
    for parameter in model.parameters():
        parameter.data.zero_()
    with pytest.raises(weights.CheckpointError, match="in 4 places") as caught:
        weights.load(model, table, wrong, tensor_rank=0, tensor_size=1, source="a test")
    assert all(name in str(caught.value) for name in (NORM, key, "model.extra", "model.more"))
    assert not any(bool(parameter.any()) for parameter in model.parameters())


@pytest.mark.parametrize("size", [1, 2])
def test_checkpoints_that_do_not_fit(size: int) -> None:
    table, tensors = tiny()
    model = plain_stage(table, tensors, tensor_size=size)
    table_rows = "model.language_model.embed_tokens.weight"
    key = "model.language_model.layers.1.self_attn.k_proj.weight"
    taller = torch.cat([tensors[table_rows], tensors[table_rows][:1]])
    for change, message in (
        ({name: tensor for name, tensor in tensors.items() if name != NORM}, f"missing: {NORM}"),
        ({**tensors, NORM: torch.zeros(3)}, rf"shape \(3,\) instead of \(64,\): {NORM}"),
        # Ranks that cut what they need would not notice a row too many.
        (
            {**tensors, table_rows: taller},
            r"shape \(164, 64\) instead of \(163, 64\): model.language_model.embed_tokens.weight",
        ),
        ({**tensors, key: tensors[key].repeat(2, 1)}, r"shape \(64, 64\) instead of \(32, 64\): .*k_proj.weight"),
        ({**tensors, "model.extra": torch.zeros(3)}, "in 1 places:\n  fits no parameter: model.extra"),
    ):
        for rank in range(size):
            with pytest.raises(weights.CheckpointError, match=message):
                weights.load(model, table, change, tensor_rank=rank, tensor_size=size, source="a test")


def test_a_directory_without_weights(tmp_path: Path) -> None:
    with pytest.raises(weights.CheckpointError, match=r"no \*.safetensors"):
        weights.SafetensorsDirectory(tmp_path)


def test_a_file_is_mapped_no_longer_than_its_tensor(tmp_path: Path) -> None:
    """Whoever reads a directory tensor by tensor would else hold all of it in the end."""
    make_tiny_qwen3vl(tmp_path)
    file = str(tmp_path / "model.safetensors")
    directory = weights.SafetensorsDirectory(tmp_path)
    tensor = directory["model.language_model.norm.weight"]
    assert file in Path("/proc/self/maps").read_text()
    del tensor
    assert file not in Path("/proc/self/maps").read_text()


def test_two_parameters_that_hold_the_same_tensor() -> None:
    """A mapping error that would otherwise leave one of them out of every export."""
    table, tensors = tiny()
    model = plain_stage(table, tensors)
    layer = model.get_submodule("language_model.decoder.layers.0")
    layer.get_submodule("mlp.linear_fc1").register_parameter("layer_norm_weight", torch.nn.Parameter(torch.ones(64)))
    with pytest.raises(ValueError, match=r"both .*layer_norm_weight.* and .*pre_mlp_layernorm.* hold .*post_attention"):
        list(weights.stream(model, table, tensor_group=None))
