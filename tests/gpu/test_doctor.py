# SPDX-License-Identifier: Apache-2.0
"""Claim: on a GPU ``doctor`` says what Transformer Engine itself selects and supports, and ours agrees with it.

It runs on a GPU, or on the virtual one, which it tells from a GPU.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from megatron_g2rpo.commands import doctor
from megatron_g2rpo.commands.doctor.findings import Finding
from megatron_g2rpo.plan.planner import load_recipe
from megatron_g2rpo.policy.device import KernelError, hardware, select
from megatron_g2rpo.policy.kernels import choose
from megatron_g2rpo.policy.layouts.layout import layout_of
from megatron_g2rpo.policy.machine import this_machine
from megatron_g2rpo.policy.transformer_engine_probe import AttentionShape, ask

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: python -m tests.gpu.virtual_cuda"),
    pytest.mark.skipif(
        importlib.util.find_spec("transformer_engine") is None,
        reason="needs Transformer Engine: --transformer-engine of tests.gpu.virtual_cuda",
    ),
]

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "examples" / "recipes" / "vlm_g2rpo-qwen3vl8b-8n8g-megatron-tp4.yaml"
MODEL = f"policy.model_name={ROOT / 'examples' / 'models' / 'qwen3-vl-8b'}"
MEGATRON = "policy.megatron_cfg"
COMMON = [MODEL, "policy.generation.backend=transformers", "policy.generation.batch_size=8"]


def report(*overrides: str) -> dict[tuple[str, str], Finding]:
    found = doctor.examine(load_recipe(PAPER, [*COMMON, *overrides]))
    return {(each.group, each.what): each for each in found}


def test_the_papers_recipe_in_fp8_is_usable_and_runs_on_transformer_engine() -> None:
    fp8 = [f"{MEGATRON}.fp8_cfg={{enabled: true, fp8: hybrid, fp8_recipe: tensorwise}}"]
    found = report(*fp8, f"{MEGATRON}.context_parallel_size=2")
    assert [each for each in found.values() if each.status == "error"] == []
    recipe = {what: each for (group, what), each in found.items() if group == "recipe"}
    assert (recipe["layers"].value, recipe["attention"].value) == ("transformer_engine", "transformer_engine")
    assert recipe["optimizer"].value == "transformer_engine"
    assert recipe["attention backend"].value.startswith(("FusedAttention", "FlashAttention"))
    # 32 heads over 8 at tensor parallel 4; context parallel sequences end with padding.
    assert "8 heads over 2, padded rows" in recipe["attention backend"].why
    assert recipe["shared prompts"].value.startswith(("FusedAttention", "FlashAttention"))
    assert recipe["shared prompts"].status == "ok"
    assert "shared prompts" not in {what for _, what in report("policy.sequence_packing.shared_prefix=false")}
    assert found["Transformer Engine", "FP8 tensorwise"].value == "available"
    assert recipe["collectives"].value == select().backend
    # Of itself it says the same as it does when a recipe asks for it: MXFP8 is there from Blackwell on.
    blackwell = (select().capability or (0, 0)) >= (10, 0)
    assert found["Transformer Engine", "FP8 mxfp8"].status == ("ok" if blackwell else "absent")
    device, gpu = found["hardware", "device"], hardware(select())
    assert gpu.name is not None
    assert gpu.name in device.value
    assert (device.status == "warning") == gpu.virtual == ("(virtual)" in device.value)
    assert found["hardware", "NCCL"].value != "none"


def test_transformer_engine_confirms_that_float32_has_no_attention_for_padded_rows() -> None:
    """``kernels.choose`` refuses it without asking, before Transformer Engine is loaded."""
    overrides = ["policy.precision=float32", f"{MEGATRON}.context_parallel_size=2"]
    recipe = load_recipe(PAPER, [*COMMON, *overrides])
    with pytest.raises(KernelError, match="no attention in float32"):
        choose(recipe.policy, layout_of(recipe.policy.megatron_cfg), this_machine(select()))
    shape = {"heads": 8, "groups": 2, "head_dim": 128, "sequences": 4, "longest": 1024, "tokens": 4096, "context": 1}
    answer = ask(AttentionShape(dtype="float32", padded=True, cp_comm_type="p2p", shared_prefix=False, **shape))
    assert answer.attention == ""
    assert any("pad_between_seqs" in text for text in answer.excluded)
