# SPDX-License-Identifier: Apache-2.0
"""Claims: ``convert`` takes what runs write and gives what runs start from, whole or not at all."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_g2rpo.weights.manifest import MANIFEST, RECIPE_FILE
from tests.e2e.test_train import BARE, FIVE_DIGITS, TENSOR_PARALLEL, assert_same_step
from tests.e2e.toy import ON_DEVICE, Toy, error_of, metrics, succeed


def same_tensors(one: Path, other: Path) -> None:
    ours, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_run_s_checkpoint_becomes_the_directory_that_it_exported(straight: Path, tmp_path: Path) -> None:
    """At another layout, from the checkpoint alone: it carries config and tokenizer."""
    checkpoint = straight / "checkpoints" / "step_4"
    output = succeed("convert", "export", checkpoint, tmp_path / "hf", f"{TENSOR_PARALLEL}=2", nproc=2)
    assert f"Hugging Face checkpoint: {tmp_path / 'hf'}\n" in output
    same_tensors(tmp_path / "hf", straight / "hf")
    for name in ("tokenizer.json", "chat_template.jinja", "preprocessor_config.json", "generation_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (straight / "hf" / name).read_bytes()


def test_a_run_starts_from_an_imported_checkpoint(toy: Toy, straight: Path, tmp_path: Path) -> None:
    """The first step is that of the run that started from the Hugging Face directory."""
    imported = tmp_path / "megatron"
    succeed("convert", "import", toy.model, imported, *ON_DEVICE)
    recipe = toy.recipe(tmp_path / "recipe.yaml", logger={"log_dir": str(tmp_path / "run")})
    named = (f"policy.model_name={imported}/huggingface", f"policy.pretrained_checkpoint={imported}")
    succeed("train", recipe, *BARE, *named)
    assert_same_step(metrics(tmp_path / "run")[1], metrics(straight)[1], FIVE_DIGITS)


def test_what_cannot_be_converted_is_refused_and_leaves_nothing(toy: Toy, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    assert error_of("convert", "import", toy.model, target, *ON_DEVICE).startswith(f"{target} exists already")
    target.rmdir()
    for dtype in ([], ["--dtype", "float32"]):
        assert "is no Megatron checkpoint" in error_of("convert", "export", toy.model, target, *dtype)

    wrong = tmp_path / "wrong"
    shutil.copytree(toy.model, wrong)
    config = json.loads((wrong / "config.json").read_text())
    config["text_config"]["intermediate_size"] *= 2
    (wrong / "config.json").write_text(json.dumps(config))
    message = error_of("convert", "import", wrong, target, *ON_DEVICE)
    layers = config["text_config"]["num_hidden_layers"]
    # gate, up and down of every layer, each by name
    assert f"do not fit config.json in {3 * layers} places" in message
    assert all(
        f"layers.{layer}.mlp.{part}_proj.weight" in message for layer in range(layers) for part in ("gate", "up")
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wrong"]


def test_a_checkpoint_that_breaks_off_ends_every_process_and_leaves_nothing(straight: Path, tmp_path: Path) -> None:
    """One of two processes fails in the middle of its files."""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(straight / "checkpoints" / "step_4", checkpoint)
    for name in (MANIFEST, RECIPE_FILE):  # as of a release that wrote none: changed bytes are found as they are read
        (checkpoint / name).unlink()
    for file in checkpoint.glob("*.distcp"):
        half = file.stat().st_size // 2
        file.write_bytes(file.read_bytes()[:half] + bytes(file.stat().st_size - half))
    message = error_of("convert", "export", checkpoint, tmp_path / "hf", "--nproc", "2", "--max-shard-size", "100KB")
    assert f"{checkpoint}: " in message
    assert " cannot be read, a file of it is damaged (" in message
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_checkpoint_of_another_dtype_is_named(toy: Toy, tmp_path: Path) -> None:
    imported = tmp_path / "megatron"
    succeed("convert", "import", toy.model, imported, "--dtype", "bfloat16", *ON_DEVICE)
    recipe = toy.recipe(tmp_path / "recipe.yaml", logger={"log_dir": str(tmp_path / "run")})
    message = error_of("train", recipe, f"policy.pretrained_checkpoint={imported}")
    assert f"{imported}: its weights are bfloat16; set policy.precision to that" in message
    succeed("convert", "export", imported, tmp_path / "hf", "--dtype", "float32")
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    source = load_file(toy.model / "model.safetensors")
    assert all(torch.equal(tensor, source[name].bfloat16().float()) for name, tensor in exported.items())


class Payload:
    """What a pickle can do: it makes a directory as it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.full
def test_code_in_a_checkpoint_runs_in_no_command(toy: Toy, straight: Path, tmp_path: Path) -> None:
    """Without manifests, which would notice first that the list of tensors is another."""
    run, ran = tmp_path / "run", tmp_path / "ran"
    shutil.copytree(straight, run)
    for checkpoint in (run / "checkpoints").iterdir():
        for name in (MANIFEST, RECIPE_FILE):
            (checkpoint / name).unlink()
        metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
        metadata.planner_data = Payload(ran)
        (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    recipe, checkpoint = toy.recipe(tmp_path / "recipe.yaml"), run / "checkpoints" / "step_4"
    for command in (
        ("convert", "export", checkpoint, tmp_path / "hf"),
        ("train", recipe, f"logger.log_dir={run}"),
        ("train", recipe, f"logger.log_dir={tmp_path / 'new'}", f"policy.pretrained_checkpoint={checkpoint}"),
    ):
        assert f"{checkpoint / '.metadata'} is not to be trusted: it names posix.mkdir" in error_of(*command), command
    assert not ran.exists()


@pytest.mark.full
def test_a_run_replaces_its_own_export_and_nothing_else(toy: Toy, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    (run / "hf.old").mkdir()
    (run / "hf.old" / "f").write_text("mine")
    recipe = toy.recipe(tmp_path / "recipe.yaml")
    before = {path.name for path in run.iterdir()}
    succeed("train", recipe, f"logger.log_dir={run}")
    assert (run / "hf.old" / "f").read_text() == "mine"
    assert {path.name for path in run.iterdir()} == before
    (run / "hf" / "notes.md").write_text("mine")
    message = error_of("train", recipe, f"logger.log_dir={run}", "grpo.max_num_steps=5")
    assert (
        f"{run / 'hf'} exists already and is not replaced: it holds what this run did not write (notes.md)" in message
    )
    assert max(metrics(run)) == 4, "it is said before the first step"


@pytest.mark.full
def test_weights_that_are_no_numbers_start_no_command(toy: Toy, tmp_path: Path) -> None:
    broken, name = tmp_path / "broken", "model.language_model.norm.weight"
    shutil.copytree(toy.model, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors[name][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": [{"role": "user", "content": "1"}], "response": "2"}))
    log = f"logger.log_dir={tmp_path / 'run'}"
    for command in (
        ("train", toy.recipe(tmp_path / "train.yaml"), log, f"policy.model_name={broken}"),
        ("sft", toy.recipe(tmp_path / "sft.yaml", "sft"), log, f"policy.model_name={broken}"),
        ("convert", "import", broken, tmp_path / "megatron", *ON_DEVICE),
        ("logprobs", "--model", broken, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl"),
    ):
        assert f"{name} in {broken / 'model.safetensors'} holds NaN" in error_of(*command), command
