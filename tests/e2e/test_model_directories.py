# SPDX-License-Identifier: Apache-2.0
"""Claim: a run starts from a model directory as people have them, and its export says what it was trained with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor

from tests.e2e.toy import Toy, succeed


def test_a_directory_of_transformers_5_with_stale_weights_trains_and_exports_its_bounds(
    toy: Toy, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(toy.model, tmp_path / "model"))
    old = model / "preprocessor_config.json"
    (model / "processor_config.json").write_text(json.dumps({"image_processor": json.loads(old.read_text())}))
    old.unlink()
    stale = {name: tensor * 0 for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(stale, model / "zz_old.safetensors")
    recipe = Toy(toy.data, model).recipe(
        tmp_path / "sft.yaml", "sft", logger={"log_dir": str(tmp_path / "run")}, data={"max_pixels": 2048}
    )
    settings = ("sft.max_num_steps=1", "sft.val_at_end=false")
    succeed("sft", recipe, *settings, "checkpointing.export_hf=true", "checkpointing.save_period=1")
    for place in ("hf", "checkpoints/step_1/huggingface"):
        assert AutoImageProcessor.from_pretrained(tmp_path / "run" / place).size["longest_edge"] == 2048, place
        assert not (tmp_path / "run" / place / "preprocessor_config.json").exists(), place
    name = "model.language_model.embed_tokens.weight"
    trained, source = (load_file(d / "model.safetensors")[name] for d in (tmp_path / "run" / "hf", model))
    # One step of Adam moves no weight by much more than its learning rate, which is far below the weights' size.
    assert (trained - source).abs().max() < 0.1 * source.abs().max()
