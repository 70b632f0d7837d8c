# SPDX-License-Identifier: Apache-2.0
"""Claims: an export of the policy is what it loaded; streaming it has no side effects; a full disk is told with the
file.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from megatron_g2rpo import weights
from megatron_g2rpo.policy.device import select
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.weights.export import SafetensorsWriter
from tests.common.policy_layout import policy_section
from tests.common.tiny_model import make_tiny_qwen3vl


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_export_equals_import_bit_for_bit(tmp_path: Path, tied: bool) -> None:
    _, model = make_tiny_qwen3vl(tmp_path / "in", tied=tied, vocab=163)
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    policy = MegatronPolicy(policy_section(tmp_path / "in"), select("cpu"), seed=0, max_steps=None)
    # 40 kB a file: several shards and an index.
    weights.export_hf(
        policy.stream(), policy.specs(), tmp_path / "out", source=tmp_path / "in", write=True, max_shard_size=40_000
    )
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"], "nothing is left beside the export"
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    modes = {file.stat().st_mode for file in (tmp_path / "out").iterdir()}
    assert len(modes) == 1, "the weights are as readable as the files beside them"
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_an_export_is_not_rounded_to_the_dtype_of_its_source(tmp_path: Path) -> None:
    """A bf16 model trained in fp32: its config.json says bfloat16, and would have the new weights cast as they load."""
    _, model = make_tiny_qwen3vl()
    model.bfloat16().save_pretrained(tmp_path / "in")
    policy = MegatronPolicy(policy_section(tmp_path / "in"), select("cpu"), seed=0, max_steps=None)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1 + 2**-12)  # lost in bf16
    weights.export_hf(policy.stream(), policy.specs(), tmp_path / "out", source=tmp_path / "in", write=True)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in policy.stream())


def test_a_stream_leaves_gradients_as_they_are(tmp_path: Path) -> None:
    """A context manager around its yields would turn them off for whoever reads it."""
    make_tiny_qwen3vl(tmp_path)
    policy = MegatronPolicy(policy_section(tmp_path), select("cpu"), seed=0, max_steps=None)
    for _, tensor in policy.stream():
        assert torch.is_grad_enabled()
        assert not tensor.requires_grad


@pytest.mark.parametrize("when", ["begun", "written", "closed"])
def test_a_full_disk_is_told_with_the_file(tmp_path: Path, when: str) -> None:
    """What Linux raises where there is no space left names no file."""
    path, specs = tmp_path / "model.safetensors", {"w": torch.empty(9, device="meta")}

    def export() -> None:
        if when == "begun":
            path.symlink_to("/dev/full")
        with SafetensorsWriter(path, specs) as writer:
            if when != "begun":
                # Without a buffer a write fails itself, else the end of the file.
                writer._file = open("/dev/full", "wb", buffering=0 if when == "written" else -1)  # noqa: SIM115
            writer.write("w", torch.zeros(9))

    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        export()
