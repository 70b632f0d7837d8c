# SPDX-License-Identifier: Apache-2.0
"""Claims: weights that are damaged, or no finite numbers, are refused wherever they are read, by tensor and file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_g2rpo.commands.convert.export_hf import export
from megatron_g2rpo.commands.eval.model import DirectoryWeights
from megatron_g2rpo.policy.device import select
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.train.run.checkpoints import Checkpoints, write_checkpoint
from megatron_g2rpo.weights import CheckpointError
from megatron_g2rpo.weights.manifest import MANIFEST
from megatron_g2rpo.weights.megatron_checkpoint import MODEL_FILES, MegatronCheckpoint
from megatron_g2rpo.weights.soundness import flaw
from tests.common.policy_layout import layout_options, policy_section
from tests.common.tiny_model import make_tiny_qwen3vl

VISION, LANGUAGE = "model.visual.patch_embed.proj.bias", "model.language_model.layers.0.self_attn.k_proj.weight"
EMBEDDING = "model.language_model.embed_tokens.weight"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_tiny_qwen3vl(directory, layers=1, vision_depth=2, deepstack=(0,))
    return directory


@pytest.fixture
def checkpoint(model_dir: Path, tmp_path: Path) -> Path:
    """A checkpoint as a run writes it."""
    policy = MegatronPolicy(layout_options(model_dir), select("cpu"), seed=0, max_steps=None)
    Checkpoints(tmp_path, None, run_id="r").save(1, policy, {})
    return tmp_path / "step_1"


def exported(checkpoint: Path) -> None:
    options = {"source": checkpoint / MODEL_FILES, "dtype": "float32", "max_shard_size": "5GB"}
    export(MegatronCheckpoint(checkpoint), checkpoint.with_name("hf"), **options)


def started_from(checkpoint: Path) -> None:
    settings = policy_section(checkpoint / MODEL_FILES, f"pretrained_checkpoint={checkpoint}")
    MegatronPolicy(settings, select("cpu"), seed=0, max_steps=None)


READERS = pytest.mark.parametrize("read", [exported, started_from])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_one_value_of_many_is_found(bad: float, dtype: torch.dtype) -> None:
    tensor = torch.randn(37, 1001, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert flaw(tensor, torch.float32) == ""
    for row, column in ((0, 0), (18, 500), (36, 1000)):
        broken = tensor.clone()
        broken[row, column] = bad
        assert flaw(broken, torch.float32) == ("holds NaN" if bad != bad else "holds Inf")


def test_a_value_that_the_dtype_cannot_hold_is_found_and_an_empty_tensor_is_sound() -> None:
    assert flaw(torch.tensor([1.0, -1e39], dtype=torch.float64), torch.float32) == (
        "holds -1e+39, which torch.float32 cannot hold"
    )
    assert flaw(torch.tensor([65504.0, 7e4]), torch.float16) == "holds 7e+04, which torch.float16 cannot hold"
    assert flaw(torch.tensor([7e4]), torch.bfloat16) == ""
    assert flaw(torch.empty(0, 3), torch.float32) == ""


def _spoil(source: Path, target: Path, **values: float) -> Path:
    """A copy of a model directory in which one value of some tensors is another."""
    target.mkdir()
    tensors: dict[str, Tensor] = load_file(source / "model.safetensors")
    for name, value in values.items():
        tensors[name].view(-1)[-1] = value
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    return target


def test_a_policy_does_not_start_from_what_is_no_number(model_dir: Path, tmp_path: Path) -> None:
    """Fused parameters too: the tensor of the three that has it is named, and all of the model's are."""
    values = {VISION: float("inf"), LANGUAGE: float("nan"), EMBEDDING: float("nan")}
    directory = _spoil(model_dir, tmp_path / "in", **values)
    with pytest.raises(CheckpointError, match=f"{directory}: 3 tensors cannot be computed with; use another") as caught:
        MegatronPolicy(policy_section(directory), select("cpu"), seed=0, max_steps=None)
    file = directory / "model.safetensors"
    expected = {f"{name} in {file} holds {'Inf' if name == VISION else 'NaN'}" for name in values}
    assert {line.strip() for line in str(caught.value).splitlines()[1:]} == expected


def test_nor_does_an_evaluation(model_dir: Path, tmp_path: Path) -> None:
    directory = _spoil(model_dir, tmp_path / "in", **{LANGUAGE: float("nan")})
    source = DirectoryWeights(policy_section(directory), select("cpu")).source()
    with pytest.raises(CheckpointError, match=f"{directory / 'model.safetensors'}: .*\n  {LANGUAGE} holds NaN"):
        list(source)


@READERS
def test_a_checkpoint_of_what_is_no_number_is_refused_by_tensor(checkpoint: Path, model_dir: Path, read) -> None:
    policy = MegatronPolicy(policy_section(model_dir), select("cpu"), seed=0, max_steps=None)
    with torch.no_grad():
        dict(policy.model.named_parameters())["language_model.decoder.final_layernorm.weight"][0] = float("nan")
    write_checkpoint(checkpoint.with_name("step_2"), policy, policy.sharded_state_dict())
    with pytest.raises(CheckpointError, match=r"step_2: 1 tensors cannot be .*\n  .*norm\.weight holds NaN"):
        read(checkpoint.with_name("step_2"))
    assert not checkpoint.with_name("hf").exists()


@READERS
def test_a_checkpoint_in_which_bytes_changed_is_refused_by_file(checkpoint: Path, read) -> None:
    """One bit of a weight: what it makes of it is a weight as good as any."""
    file = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{checkpoint} is damaged; .*\n  {file} holds other bytes than were"):
        read(checkpoint)
    assert {path.name for path in checkpoint.parent.iterdir()} == {"step_1"}


@READERS
def test_a_checkpoint_without_a_manifest_is_read_if_it_is_whole(checkpoint: Path, read) -> None:
    """As those of releases up to 0.4 are."""
    (checkpoint / MANIFEST).unlink()
    read(checkpoint)
    shutil.rmtree(checkpoint.with_name("hf"), ignore_errors=True)  # the target of the next one
    file = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"{checkpoint} is damaged; .*\n  {file} has .* bytes, at least"):
        read(checkpoint)
