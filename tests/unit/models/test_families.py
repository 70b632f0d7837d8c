# SPDX-License-Identifier: Apache-2.0
"""Claims: what a family says becomes the policy's, and a family is one file, which may stand outside of the package.

The families of ``outside`` have what those of the package lack: biases, chunked rotary frequencies, a tower with
windows of attention and without deepstack. Their policies must compute what transformers computes.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Config, Qwen2ForCausalLM

from megatron_g2rpo import models
from megatron_g2rpo.data.packing import response_values
from megatron_g2rpo.policy.device import select
from megatron_g2rpo.policy.layouts.layout import Layout, LayoutError, check_layout
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.weights.rules import GroupedQKV
from tests.common.parity import TEMPERATURE, packer_for, random_sequences, toy_loss, transformers_values
from tests.common.policy_layout import layout_options
from tests.common.text_models import SHAPE
from tests.common.tiny_model import randomise, special_tokens, table_for, tiny_config
from tests.unit.models import outside

# fp32 noise over a few layers, as for the families of the package.
TOLERANCE = 1e-5
VOCAB = 161
SECTION = [4, 2, 2]


def saved(model: Any, directory: Path) -> Any:
    """The model with every parameter random, in a directory, under the names that its modules have."""
    randomise(model, seed=0)
    model.config.save_pretrained(directory)
    tensors = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    save_file(tensors, directory / "model.safetensors")
    return model.float().eval()


def qwen2(directory: Path, *, tied: bool = True) -> Any:
    config = Qwen2Config(
        **SHAPE, num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCAB, tie_word_embeddings=tied
    )
    return saved(Qwen2ForCausalLM(config), directory)


def qwen25_vl(directory: Path) -> Any:
    tokens = special_tokens(VOCAB)
    text = {
        **SHAPE, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": SECTION},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64, "patch_size": 8,
        "fullatt_block_indexes": [1], "window_size": 32, "in_channels": 3, "temporal_patch_size": 2,
        "spatial_merge_size": 2,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=tokens.image, video_token_id=tokens.video,
        vision_start_token_id=tokens.vision_start, vision_end_token_id=tokens.vision_end, tie_word_embeddings=False,
    )  # fmt: skip
    return saved(Qwen2_5_VLForConditionalGeneration(config), directory)


def main_grad(weight: Any) -> Tensor:
    return weight.main_grad


def compare(policy: MegatronPolicy, model: Any, sequences: list[Any], packer: Any) -> None:
    """Log-probabilities and the gradient of every weight, against transformers."""
    expected = transformers_values(model, sequences)
    rows = packer.pack(sequences, budget=300)
    for row, stats in zip(rows, policy.logprobs(rows, TEMPERATURE), strict=True):
        for index, values in response_values(row, stats.logprobs).items():
            assert float((values - expected.logprobs[index]).abs().max()) <= TOLERANCE
    policy.gradients(rows, toy_loss, TEMPERATURE)
    ours = {key: gradient.clone() for key, gradient in policy.stream(main_grad)}
    assert ours.keys() == expected.gradients.keys()
    for key, gradient in expected.gradients.items():
        # Key biases move no attention weight: their gradient is noise around 0.
        scale = max(float(gradient.norm()), 1e-3 * expected.grad_norm)
        assert float((ours[key] - gradient).norm()) / scale <= TOLERANCE, key


def test_a_text_family_of_a_users_own_equals_transformers(tmp_path: Path) -> None:
    model = qwen2(tmp_path)
    policy = MegatronPolicy(layout_options(tmp_path), select("cpu"), seed=0, max_steps=1)
    assert any(name.endswith("linear_qkv.bias") for name, _ in policy.model.named_parameters())
    config = tiny_config(vocab=VOCAB)
    packer = replace(packer_for(config), positions=models.family("qwen2").positions)
    compare(policy, model, random_sequences(config, grids=((), (), ())), packer)


def test_a_family_of_a_users_own_that_sees_equals_transformers(tmp_path: Path) -> None:
    model = qwen25_vl(tmp_path)
    policy = MegatronPolicy(layout_options(tmp_path), select("cpu"), seed=0, max_steps=1)
    packer = replace(packer_for(model.config), positions=models.family("qwen2_5_vl").positions)
    compare(policy, model, random_sequences(model.config), packer)


def test_another_familys_angles_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative: Qwen3-VL's interleaved frequencies agree on text and must fail here, on images."""
    model = qwen25_vl(tmp_path)
    monkeypatch.setattr(outside.Qwen25VL, "angles", models.qwen3_vl.Qwen3VL.angles)
    policy = MegatronPolicy(layout_options(tmp_path), select("cpu"), seed=0, max_steps=1)
    with pytest.raises(AssertionError):
        compare(policy, model, random_sequences(model.config), packer_for(model.config))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_biases_are_cut_and_joined_as_weights_are(size: int) -> None:
    rule = GroupedQKV(heads=4, groups=2, head_dim=3)
    full = [torch.randn(rows) for rows in (12, 6, 6)]
    merged = rule.merge([rule.shard(full, rank, size) for rank in range(size)])
    assert all(torch.equal(found, tensor) for found, tensor in zip(merged, full, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "policy.model_name: only gated MLPs with silu"),
        ({"attention_bias": True}, "policy.model_name: only gated MLPs with silu, and layers without biases"),
        ({"use_sliding_window": True}, "policy.model_name: sliding-window attention is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "policy.model_name: rope_type 'yarn' is not supported; known: "),
    ],
)
def test_a_model_that_would_be_computed_wrongly_is_refused(change: dict[str, Any], message: str) -> None:
    config = tiny_config()
    for name, value in change.items():
        setattr(config.text_config, name, value)
    with pytest.raises(LayoutError) as caught:
        check_layout(config, Layout())
    assert str(caught.value).startswith(message)


def test_rows_are_found_in_the_source_by_the_names_that_errors_show() -> None:
    """A name of an error message, with its layer number replaced, is a literal of the source."""
    source = "".join(path.read_text() for path in Path(models.__file__).parent.glob("*.py"))
    for row in table_for(tiny_config()).rows:
        assert f'"{row.megatron}"' in source
        for name in row.hf:
            text_only = name.replace("model.language_model.", "model.")
            assert f'"{text_only}"' in source


def test_an_unknown_model_type_lists_the_known_ones() -> None:
    message = r"unknown model family 'qwen3vl' \(did you mean 'qwen3_vl'\?\); known: .*llama"
    with pytest.raises(ValueError, match=message):
        models.family("qwen3vl")


def test_families_are_known_without_megatron_core_and_modelling_code() -> None:
    code = (
        "import sys\n"
        "from megatron_g2rpo import registry\n"
        "assert registry.model_families.names() == ('llama', 'qwen3', 'qwen3_vl')\n"
        "print(sorted({'megatron', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
