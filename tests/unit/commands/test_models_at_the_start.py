# SPDX-License-Identifier: Apache-2.0
"""Claims: what is wrong with a model directory, a target, an option or the data behind a metric is found at the start,
with what to do.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_g2rpo import recipe as recipes
from megatron_g2rpo.cli import app
from megatron_g2rpo.commands.convert.common import check_target, warn_without_tokenizer
from megatron_g2rpo.commands.preflight import checked
from megatron_g2rpo.data.shard_writer import ShardWriter
from megatron_g2rpo.recipe import RecipeError
from megatron_g2rpo.weights.ownership import MARKER
from megatron_g2rpo.weights.safetensors_directory import INDEX_NAME

POLICY = Path(__file__).parents[3] / "examples" / "quickstart" / "policy"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(POLICY, tmp_path / "model"))


def faults(model: Path, *overrides: str) -> str:
    settings = (f"policy.model_name={model}", "env.tasks={any: {}}", *overrides)
    with pytest.raises(RecipeError) as error:  # for the data at least, which is nowhere
        checked(recipes.EXEMPLARS / "vlm_sft.yaml", settings, "sft", download=False)
    return str(error.value)


def test_a_whole_model_has_no_fault(model):
    assert "policy.model_name" not in faults(model)


def test_tokenizer_and_weights_are_looked_at_before_anything_starts(model):
    (model / "tokenizer.json").unlink()
    (model / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "absent.safetensors"}}))
    found = faults(model)
    assert f"policy.model_name: {model} has no tokenizer" in found
    assert f"policy.model_name: {model / INDEX_NAME} names files that are not there: absent.safetensors" in found


def test_pixel_bounds_and_a_git_lfs_pointer_are_found_too(model):
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    found = faults(model, "data.min_pixels=99999")
    assert "policy.model_name: pixel bounds 99999 to 16384 are not in order" in found
    assert "is a pointer of git-lfs, not the weights; run `git lfs pull`" in found


def test_weights_that_are_not_read_need_not_be_there(model, tmp_path):
    (model / "model.safetensors").unlink()
    assert "no *.safetensors file" in faults(model)
    assert "safetensors" not in faults(model, "policy.init=random")
    found = faults(model, f"policy.pretrained_checkpoint={tmp_path}")
    assert "safetensors" not in found
    assert f"policy.pretrained_checkpoint: {tmp_path} is no Megatron checkpoint" in found


def test_a_metric_of_a_task_without_validation_data_is_found_before_any_step(model, tmp_path):
    fields = {"task": "chart", "question": "1 + 1?", "answer": "2", "answer_format": "exact"}
    with ShardWriter(tmp_path / "shards") as writer:
        writer.write("0000", fields, [])
    keys = ("env.tasks={chart: {}, ocr: {}}", f"data.validation.path={tmp_path / 'shards'}")
    found = faults(model, *keys, "checkpointing.metric_name=val/ocr/reward")
    assert (
        "val/ocr/reward is never measured, as data.validation has no usable sample of task ocr; it has chart" in found
    )
    for metric in ("val/chart/reward", "val/mean_reward"):
        assert "never measured" not in faults(model, *keys, f"checkpointing.metric_name={metric}")


@pytest.mark.parametrize("size", ["banana", "5", "GB", "-5GB", "0GB", "5GiB", "1e3MB"])
def test_a_size_that_is_none_is_refused_as_it_is_parsed(tmp_path, size):
    arguments = ["convert", "export", str(tmp_path), str(tmp_path / "out"), f"--max-shard-size={size}"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert f"'{size}' is no size" in result.output


@pytest.mark.parametrize("size", ["5GB", "500mb", "1.5 TB"])
def test_a_size_is_taken(tmp_path, size):
    arguments = ["convert", "export", str(tmp_path), str(tmp_path / "out"), f"--max-shard-size={size}"]
    assert "is no Megatron checkpoint" in CliRunner().invoke(app, arguments).output


def test_a_target_that_is_a_symlink_to_nothing_exists(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match=f"{tmp_path / 'out'} exists already"):
        check_target(tmp_path / "out")
    check_target(tmp_path / "free")


@pytest.mark.parametrize("content", ["common.pt", "model.safetensors", "notes/f"])
def test_where_a_target_is_written_first_only_what_a_conversion_left_may_be(tmp_path, content):
    partial = tmp_path / "out.partial"
    (partial / content).parent.mkdir(parents=True)
    (partial / content).write_text("f")
    if content == "common.pt":  # of an import that was killed
        check_target(tmp_path / "out")
        return
    with pytest.raises(FileExistsError, match=f"{partial} is in the way"):
        check_target(tmp_path / "out")
    (partial / MARKER).write_text('{"run_id": "", "files": null}')  # of an export that was killed
    check_target(tmp_path / "out")


def test_a_model_without_a_tokenizer_is_converted_with_a_word(model, capsys):
    warn_without_tokenizer(model)
    assert capsys.readouterr().err == ""
    (model / "tokenizer.json").unlink()
    warn_without_tokenizer(model)
    assert f"warning: {model} has no tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("absent", [("vllm",), ("starlette", "vllm"), ("httpx", "starlette", "vllm")])
def test_serve_without_vllm_says_what_to_install(monkeypatch, absent):
    """Whatever of it is missing first, packages that come with it included."""
    for name in [name for name in sys.modules if name.partition(".")[0] in absent or name.endswith("vllm.serve")]:
        monkeypatch.delitem(sys.modules, name)
    for name in absent:
        monkeypatch.setitem(sys.modules, name, None)
    recipe = str(recipes.EXEMPLARS.parents[2] / "examples/recipes/vlm_g2rpo-quickstart-1n1g-megatron-tp1.yaml")
    result = CliRunner().invoke(app, ["serve", recipe, f"policy.model_name={POLICY}"])
    assert result.exit_code == 1
    assert "error: megatron-g2rpo serve needs vLLM, which is not installed here: pip install vllm" in result.output
