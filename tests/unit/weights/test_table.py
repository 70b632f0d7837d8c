# SPDX-License-Identifier: Apache-2.0
"""Claims: the table reads the same in both directions; a parameter it does not know is an error, never skipped."""

from __future__ import annotations

import pytest

from megatron_g2rpo.weights.table import UnmappedParameter, WeightTable
from tests.common.tiny_model import make_tiny_qwen3vl, table_for, tiny_config

LAYER = "language_model.decoder.layers.3."
HF_LAYER = "model.language_model.layers.3."
# Transformer Engine folds a norm into the linear after it.
TE_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
}


def test_unknown_parameter() -> None:
    with pytest.raises(UnmappedParameter, match=r"decoder\.layers\.0\.mystery"):
        table_for(tiny_config()).entry("language_model.decoder.layers.0.mystery")


def test_layer_numbers_count_over_pipeline_stages() -> None:
    table = table_for(tiny_config())
    entry = table.entry("language_model.decoder.layers.1.mlp.linear_fc2.weight", layer_offset=4)
    assert entry.hf_names == ("model.language_model.layers.5.mlp.down_proj.weight",)
    block = table.entry("vision_model.blocks.1.norm1.weight", layer_offset=4)
    assert block.hf_names == ("model.visual.blocks.1.norm1.weight",), "vision blocks are all on one stage"


@pytest.mark.parametrize("name", TE_NORMS)
def test_transformer_engine_norms_are_known(name: str) -> None:
    table = table_for(tiny_config())
    assert table.entry(LAYER + name).hf_names == (HF_LAYER + TE_NORMS[name],)
    without = WeightTable([row for row in table.rows if "layer_norm_weight" not in row.megatron])
    assert len(without.rows) == len(table.rows) - 2
    with pytest.raises(UnmappedParameter, match="layer_norm_weight"):
        without.entry(LAYER + name)


def test_a_tied_output_matrix_is_a_copy_of_the_embedding() -> None:
    name = "language_model.output_layer.weight"
    tied, untied = table_for(tiny_config(tied=True)).entry(name), table_for(tiny_config(tied=False)).entry(name)
    assert (tied.hf_names, tied.copy) == (("model.language_model.embed_tokens.weight",), True)
    assert (untied.hf_names, untied.copy) == (("lm_head.weight",), False)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_parameters_from_hugging_face_names_alone(tied: bool) -> None:
    config, model = make_tiny_qwen3vl(tied=tied)
    table = table_for(config)
    names = list(model.state_dict())
    assert "lm_head.weight" in names, "transformers lists a tied matrix under both names"
    parameters = table.parameters(reversed(names))
    assert all(table.entry(name) == entry for name, entry in parameters)
    held = [hf_name for _, entry in parameters for hf_name in entry.hf_names]
    assert sorted(held) == sorted(set(names) - ({"lm_head.weight"} if tied else set()))
    mine = [name for name, _ in parameters]
    assert len(set(mine)) == len(mine)
    layer = "language_model.decoder.layers.2."
    assert sorted(name.removeprefix(layer) for name in mine if name.startswith(layer)) == [
        "input_layernorm.weight",
        "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight",
        "pre_mlp_layernorm.weight",
        "self_attention.k_layernorm.weight",
        "self_attention.linear_proj.weight",
        "self_attention.linear_qkv.weight",
        "self_attention.q_layernorm.weight",
    ]
    assert ("language_model.output_layer.weight" in mine) == (not tied)


def test_names_that_make_no_parameter() -> None:
    table = table_for(tiny_config())
    with pytest.raises(UnmappedParameter, match=r"produces the Hugging Face tensor 'model\.extra'"):
        table.parameters(["model.extra"])
    projection = "model.language_model.layers.0.self_attn.{}_proj.weight"
    with pytest.raises(UnmappedParameter, match=r"layers\.0\.self_attn\.v_proj"):
        table.parameters([projection.format("q"), projection.format("k")])
