# SPDX-License-Identifier: Apache-2.0
"""Claims: a model directory's own weights are read and nothing else; what is broken is named with what to do."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_g2rpo import weights
from megatron_g2rpo.policy.device import select
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.weights import CheckpointError, SafetensorsDirectory
from megatron_g2rpo.weights.safetensors_directory import INDEX_NAME
from tests.common.policy_layout import policy_section
from tests.common.text_models import make_text_model
from tests.common.tiny_model import make_tiny_qwen3vl


def tensors(seed: int, *names: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(3, 2, generator=generator) for name in names}


def write_index(directory: Path, weight_map: dict[str, str]) -> None:
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def equal(found: SafetensorsDirectory, expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], each) for name, each in expected.items())


def test_the_index_decides_and_what_it_does_not_name_is_ignored_with_a_word(tmp_path, caplog):
    """A second save with other shard sizes leaves the first one's shards, which sort after the new ones."""
    right = tensors(1, "a", "b")
    save_file({"a": right["a"]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": right["b"], **tensors(2, "c")}, tmp_path / "model-00002-of-00002.safetensors")
    save_file(tensors(3, "a", "b"), tmp_path / "model-00003-of-00003.safetensors")
    save_file(tensors(4, "a", "b"), tmp_path / "zz_old.safetensors")
    write_index(tmp_path, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    with caplog.at_level(logging.WARNING):
        found = SafetensorsDirectory(tmp_path)
        SafetensorsDirectory(tmp_path)
    assert equal(found, right)
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{tmp_path}: ignored, because {INDEX_NAME} does not name them: model-00003-of-00003.safetensors, "
        "zz_old.safetensors, c in model-00002-of-00002.safetensors"
    )


def test_two_whole_models_of_which_readers_would_take_different_ones_are_refused(tmp_path):
    save_file(tensors(1, "a"), tmp_path / "model-00001-of-00001.safetensors")
    write_index(tmp_path, {"a": "model-00001-of-00001.safetensors"})
    SafetensorsDirectory(tmp_path)
    save_file(tensors(2, "a"), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{tmp_path} holds two models: model\.safetensors, .*; move one"):
        SafetensorsDirectory(tmp_path)


@pytest.mark.parametrize("other", ["zz_old", "consolidated", "consolidated.00", "adapter_model", "a_copy"])
def test_without_an_index_the_single_file_is_the_model(tmp_path, caplog, other):
    right = tensors(1, "a", "b")
    save_file(right, tmp_path / "model.safetensors")
    save_file(tensors(2, "a", "x"), tmp_path / f"{other}.safetensors")
    assert equal(SafetensorsDirectory(tmp_path), right)
    assert caplog.messages == [f"{tmp_path}: ignored, because they are not the model's: {other}.safetensors"]


def test_files_without_an_index_are_one_model_if_no_tensor_is_in_two_of_them(tmp_path):
    right = tensors(1, "a", "b")
    for name in right:
        save_file({name: right[name]}, tmp_path / f"part-{name}.safetensors")
    save_file(tensors(3, "q"), tmp_path / "consolidated.safetensors")
    assert equal(SafetensorsDirectory(tmp_path), right)
    save_file(tensors(2, "b", "c"), tmp_path / "part-c.safetensors")
    message = rf"b is in part-b\.safetensors and in part-c\.safetensors, and no {INDEX_NAME} says which counts"
    with pytest.raises(CheckpointError, match=message):
        SafetensorsDirectory(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", r"index\.json is not JSON .*; copy it again"),
        ("version https://git-lfs.github.com/spec/v1\n", r"index\.json is not JSON .*run `git lfs pull`"),
        ("[]", r"index\.json has no weight_map from tensors to files"),
        ('{"weight_map": {"a": 3}}', r"index\.json has no weight_map from tensors to files"),
        ('{"weight_map": {"a": "absent.safetensors"}}', r"names files that are not there: absent\.safetensors"),
        ('{"weight_map": {"a": "../model.safetensors"}}', r"names files outside of its directory: \.\./model"),
        (
            '{"weight_map": {"a": "model.safetensors", "z": "model.safetensors"}}',
            r"names 1 tensors that are not there: z in model\.safetensors",
        ),
    ],
)
def test_a_broken_index_is_an_error(tmp_path, index, message):
    save_file(tensors(1, "a"), tmp_path / "model.safetensors")
    (tmp_path / INDEX_NAME).write_text(index)
    with pytest.raises(CheckpointError, match=message):
        SafetensorsDirectory(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "pointer of git-lfs.*`git lfs pull`"),
        (b"", r"is damaged or was not copied whole \(0 bytes"),
        (None, r"is damaged or was not copied whole \(\d+ bytes"),
    ],
    ids=["pointer", "empty", "truncated"],
)
def test_a_file_that_is_not_whole_is_named_with_what_to_do(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    save_file(tensors(1, "a", "b"), path)
    path.write_bytes(path.read_bytes()[:-1] if content is None else content)
    with pytest.raises(CheckpointError, match=rf"{path} .*{message}|{path} {message}"):
        SafetensorsDirectory(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.int32, torch.uint8])
def test_quantised_weights_are_refused_by_name(tmp_path, dtype):
    save_file({**tensors(1, "a"), "b.weight": torch.zeros(2).to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensors are not of .*: b\.weight \(.*use the model as it was before"):
        SafetensorsDirectory(tmp_path)


def test_what_is_no_model_s_weights_says_what_it_is(tmp_path):
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors file"):
        SafetensorsDirectory(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin can be read by transformers"):
        SafetensorsDirectory(tmp_path)
    save_file(tensors(1, "a"), tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"only adapter_model\.safetensors \(an adapter: merge it"):
        SafetensorsDirectory(tmp_path)


def test_left_over_rotary_frequencies_are_ignored(tmp_path, caplog):
    """Their float32 among 16-bit weights must not count as a second dtype either."""
    model = make_text_model(None, "llama", tied=True).bfloat16()
    model.save_pretrained(tmp_path)
    path, before = tmp_path / "model.safetensors", dict(SafetensorsDirectory(tmp_path))
    old = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in range(4)}
    save_file({**before, **old}, path, metadata={"format": "pt"})
    assert SafetensorsDirectory(tmp_path).dtypes == {torch.bfloat16}
    policy = MegatronPolicy(policy_section(tmp_path), select("cpu"), seed=0, max_steps=None)
    assert all(torch.equal(tensor, before[name].float()) for name, tensor in policy.stream())
    assert not caplog.messages


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_another_precision_load_into_the_recipe_s(tmp_path, dtype):
    _, model = make_tiny_qwen3vl()
    model.to(dtype).save_pretrained(tmp_path)
    policy = MegatronPolicy(policy_section(tmp_path), select("cpu"), seed=0, max_steps=None)
    stored = SafetensorsDirectory(tmp_path)
    assert all(torch.equal(tensor, stored[name].float()) for name, tensor in policy.stream())


def test_an_untied_model_whose_config_says_tied_only_for_its_text_is_missing_its_output_matrix(tmp_path):
    """Qwen3-VL's flag is the outer one; transformers would make up an output matrix at random."""
    make_tiny_qwen3vl(tmp_path, tied=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"] = False, True
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight"):
        MegatronPolicy(policy_section(tmp_path), select("cpu"), seed=0, max_steps=None)


def test_both_saves_in_one_directory_load_as_the_index_says(tmp_path):
    """The policy of two saves in one directory is the second save's."""
    _, first = make_tiny_qwen3vl(seed=1)
    _, second = make_tiny_qwen3vl(seed=2)
    first.save_pretrained(tmp_path, max_shard_size="50KB")
    stale = {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    assert len(stale) > 2
    second.save_pretrained(tmp_path, max_shard_size="100KB")
    for name, content in stale.items():
        if not (tmp_path / name).exists():
            (tmp_path / name).write_bytes(content)
    policy = MegatronPolicy(policy_section(tmp_path), select("cpu"), seed=0, max_steps=None)
    expected = second.state_dict()
    streamed = dict(weights.WeightSource(policy.specs, policy.stream))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in streamed.items())


def test_what_cannot_be_read_as_a_file_is_named(tmp_path):
    link, directory = tmp_path / "link" / "model.safetensors", tmp_path / "directory" / "model.safetensors"
    link.parent.mkdir()
    link.symlink_to(tmp_path / "nowhere")
    directory.mkdir(parents=True)
    for path in (link, directory):
        with pytest.raises(CheckpointError, match=rf"{path} cannot be read .*; copy it again"):
            SafetensorsDirectory(path.parent)
