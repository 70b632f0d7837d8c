# SPDX-License-Identifier: Apache-2.0
"""The paper's run on the paper's data: its sixty public samples imported, and two steps of its recipe, with vLLM.

The images are not public: pictures of the sizes that their sources have stand for them. The model is small and random,
with the quickstart's tokenizer; what the recipe says of the cluster and of sizes is overridden, nothing else.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_g2rpo import recipe
from megatron_g2rpo.data.shard_index import ShardIndex
from tests.common.openvlthinker import ROWS
from tests.e2e.toy import metrics, numbers, succeed
from tests.vllm.common import POLICY, ROOT

RECIPE = ROOT / "examples" / "recipes" / "vlm_g2rpo-qwen3vl8b-8n8g-megatron-tp4.yaml"
SIZES = ((640, 480), (336, 512), (800, 300))
SMALL = [
    "policy.init=random",
    "policy.precision=float32",
    "policy.max_total_sequence_length=2560",
    "policy.sequence_packing.train_mb_tokens=2560",
    "policy.megatron_cfg.tensor_model_parallel_size=1",
    "policy.megatron_cfg.sequence_parallel=false",
    "policy.megatron_cfg.distributed_data_parallel_config.overlap_param_gather=false",
    "policy.generation.max_new_tokens=640",
    "policy.generation.vllm_cfg.tensor_parallel_size=1",
    "policy.generation.vllm_cfg.kv_cache_memory_bytes=268435456",
    "policy.generation.vllm_cfg.enforce_eager=true",
    "policy.train_global_batch_size=12",
    "grpo.num_prompts_per_step=6",
    "grpo.num_generations_per_prompt=2",
    "grpo.dynamic_sampling.max_rounds=1",
    "grpo.max_num_steps=2",
    "grpo.max_val_samples=1",
    "grpo.val_at_start=false",
    "data.max_pixels=50176",
    "cluster.num_nodes=1",
    "cluster.gpus_per_node=1",
    "cluster.device=cpu",
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample file, and a picture under each path that it names."""
    directory = tmp_path_factory.mktemp("openvlthinker")
    rows = json.loads(ROWS.read_text())
    for number, path in enumerate(sorted({path for row in rows for path in row["images"]})):
        width, height = SIZES[number % len(SIZES)]
        pixels = np.random.default_rng(number).integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        file = directory / path
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((width, height)).save(file)
    shutil.copy(ROWS, directory / "train.json")
    return directory / "train.json"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "policy"
    shutil.copytree(POLICY, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((directory / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 4096
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_two_steps_of_the_papers_recipe_on_the_papers_samples(source: Path, model: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    succeed("data", "import", source, data, "--split", "0.2", forked=False)
    index, held_out = ShardIndex(data / "train"), ShardIndex(data / "val")
    assert len(index) + len(held_out) == 60
    papers = recipe.load(RECIPE, [], "train")
    assert index.tasks == tuple(sorted(papers.env.tasks))

    where = [f"policy.model_name={model}", f"data.train.path={data / 'train'}", f"data.validation.path={data / 'val'}"]
    run = tmp_path / "run"
    checked = succeed("data", "check", data / "train", RECIPE, *SMALL, *where, forked=False)
    assert "no faults" in checked
    # vLLM decides how it starts processes by what this one has imported.
    succeed("train", RECIPE, *SMALL, *where, f"logger.log_dir={run}", forked=False)

    steps = metrics(run)
    assert {1, 2} <= set(steps)
    for step in (1, 2):
        values = numbers(steps[step])
        assert np.isfinite(list(values.values())).all()
        # Six tasks, drawn in proportion.
        assert {name.split("/")[1] for name in values if name.endswith("/reward") and name.startswith("train/")} >= set(
            papers.env.tasks
        )
        # What vLLM says of its samples, in float32, is what the trainer says of them.
        assert values["train/rollout_gap_max"] < 1e-3
