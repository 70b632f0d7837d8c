# SPDX-License-Identifier: Apache-2.0
"""Claims about ``megatron-g2rpo plan``: what it prints, when it refuses, what it proposes, how it exits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megatron_g2rpo import cli
from megatron_g2rpo.plan.engine import ASLEEP
from megatron_g2rpo.plan.model import Model, read_config
from megatron_g2rpo.plan.planner import Plan, load_recipe, make_plan
from megatron_g2rpo.plan.verdict import changes, judge
from megatron_g2rpo.policy.layouts.layout import LayoutError

ROOT = Path(__file__).parents[3]
PAPER = ROOT / "examples" / "recipes" / "vlm_g2rpo-qwen3vl8b-8n8g-megatron-tp4.yaml"
QUICKSTART = ROOT / "examples" / "recipes" / "vlm_g2rpo-quickstart-1n1g-megatron-tp1.yaml"
CONFIG = f"policy.model_name={ROOT / 'examples' / 'models' / 'qwen3-vl-8b'}"
MEGATRON = "policy.megatron_cfg."
# The paper's recipe without what makes it cheap.
PLAIN = [
    CONFIG,
    f"{MEGATRON}tensor_model_parallel_size=4",
    f"{MEGATRON}sequence_parallel=false",
    f"{MEGATRON}recompute_granularity=null",
    f"{MEGATRON}distributed_data_parallel_config.overlap_param_gather=false",
    f"{MEGATRON}distributed_data_parallel_config.use_distributed_optimizer=false",
    "policy.generation.backend=transformers",
    "policy.generation.batch_size=8",
]


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(read_config(CONFIG.partition("=")[2]))


def plan(model: Model, *overrides: str, **assumptions: int) -> Plan:
    return make_plan(load_recipe(PAPER, [*PLAIN, *overrides]), model, **assumptions)


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, ["plan", *arguments])
    return result.exit_code, result.output


def refusal(*arguments: str) -> str:
    """What a command that must fail says, which is no traceback."""
    result = CliRunner().invoke(cli.app, ["plan", *arguments])
    assert isinstance(result.exception, SystemExit), f"{result.exception!r}\n{result.output}"
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: "), result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


def test_json_holds_what_the_tables_say() -> None:
    code, output = invoke(str(PAPER), *PLAIN, "--json", "--gpu-memory-gb", "1000")
    assert code == 0, output
    tree: dict[str, Any] = json.loads(output)
    assert tree["verdict"]["fits"] is True
    assert tree["layout"] == {
        "tensor": 4,
        "pipeline": 1,
        "context": 1,
        "data": 16,
        "sequence_parallel": False,
        "first_stage_layers": None,
        "last_stage_layers": None,
        "token_alignment": 1,
    }
    [stage] = tree["stages"]
    assert stage["peak"] == stage["persistent"] + max(stage["phases"].values()) + stage["memory"]["allowance"]
    # bf16 weights, float32 gradients, two float32 moments and a master copy, all of them whole.
    parameters = stage["parameters"]
    memory = stage["memory"]
    assert (memory["weights"], memory["gradients"], memory["optimizer"]) == (
        2 * parameters,
        4 * parameters,
        12 * parameters,
    )
    code, output = invoke(str(PAPER), *PLAIN, "--gpu-memory-gb", "1000")
    assert code == 0
    for words in (
        "Memory of a rank",
        "Micro-batches",
        "Bytes that a rank sends",
        "Sharing prompts",
        "Fits 1,000.00 GB",
    ):
        assert words in output, output


def test_a_recipe_that_does_not_fit_is_told_what_does() -> None:
    code, output = invoke(str(PAPER), *PLAIN, "--json")
    tree = json.loads(output)
    verdict = tree["verdict"]
    assert (code, verdict["fits"]) == (1, False)
    assert verdict["peak"] > 80e9 >= verdict["change"]["peak"]
    # What it proposes does fit, when it is planned by itself.
    code, output = invoke(str(PAPER), *PLAIN, *verdict["change"]["overrides"], "--json")
    assert code == 0, output
    assert json.loads(output)["verdict"]["peak"] == verdict["change"]["peak"]


def test_a_recipe_that_nothing_helps_is_told_so() -> None:
    # One process: no other layout is tried.
    code, output = invoke(str(QUICKSTART), CONFIG, "--gpu-memory-gb", "10")
    assert code == 1
    assert "Does not fit 10.00 GB" in output
    assert "changes tried fits either" in " ".join(output.split())


def test_the_first_change_that_fits_is_named(model: Model) -> None:
    """Cheap changes come first, and are enough where they are enough."""
    original = plan(model)
    tried: list[tuple[str, ...]] = []

    def again(overrides: tuple[str, ...]) -> Plan:
        tried.append(overrides)
        return plan(model, *overrides)

    verdict = judge(original, original.worst.peak - 1, again)
    assert verdict.change is not None
    assert verdict.change.overrides == tried[-1]
    assert verdict.change.overrides == (f"{MEGATRON}distributed_data_parallel_config.use_distributed_optimizer=true",)
    # Nothing that costs more model parallelism comes before all that costs none.
    order = list(changes(original))
    layouts = [index for index, change in enumerate(order) if any("_model_parallel_size" in key for key in change)]
    assert all("_model_parallel_size" not in key for change in order[: layouts[0]] for key in change)
    assert (f"{MEGATRON}recompute_granularity=full",) in order[: layouts[0]]
    assert (f"{MEGATRON}sequence_parallel=true",) in order[: layouts[0]]
    assert ("policy.generation.batch_size=4",) in order[: layouts[0]]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("tensor_model_parallel_size=64", "tensor_model_parallel_size=64"),
        ("pipeline_model_parallel_size=16", "pipeline_model_parallel_size=16"),
        ("num_layers_in_first_pipeline_stage=2", "pipeline_model_parallel_size above 1"),
        ("tensor_model_parallel_size=5", "policy.megatron_cfg.tensor_model_parallel_size"),
    ],
)
def test_a_layout_that_does_not_divide_names_the_key(override: str, key: str) -> None:
    assert key in " ".join(refusal(str(PAPER), *PLAIN, f"{MEGATRON}{override}").split())


def test_chunks_of_layers_must_divide_the_stages(model: Model) -> None:
    full = [f"{MEGATRON}recompute_granularity=full", f"{MEGATRON}recompute_num_layers=5"]
    with pytest.raises(LayoutError, match="recompute_num_layers=5 does not divide the 36 layers"):
        plan(model, *full)
    assert plan(model, *full, f"{MEGATRON}recompute_method=block").stages[0].layers == 36


def test_stages_differ_as_pipelines_do(model: Model) -> None:
    four = plan(model, f"{MEGATRON}pipeline_model_parallel_size=4")
    assert [stage.in_flight for stage in four.stages] == [4, 3, 2, 1]
    assert [stage.layers for stage in four.stages] == [9, 9, 9, 9]
    assert [bool(stage.vision_activations) for stage in four.stages] == [True, False, False, False]
    assert [bool(stage.output_activations) for stage in four.stages] == [False, False, False, True]
    assert four.worst.stage == 0
    # 1,024 sequences of the longest kind over 4 data-parallel ranks, one a row.
    assert four.batches.count == 256
    assert four.bubble == 3 / (256 + 3)


def test_shorter_sequences_need_fewer_micro_batches(model: Model) -> None:
    assert plan(model).batches.count == 64
    alone = "policy.sequence_packing.shared_prefix=false"
    short = plan(model, alone, mean_tokens=2048, image_tokens=1024)
    # A group of 8 shares a row of 20,480 tokens: 8 x 2,048, and a second does not fit.
    assert (short.batches.count, short.batches.images) == (8, 8)
    longer = "policy.sequence_packing.train_mb_tokens=32768"
    assert plan(model, alone, longer, mean_tokens=2048, image_tokens=1024).batches.count == 4
    # With its prompt shared it takes 1,023 + 8 x 1,024 tokens, and a row holds two or three.
    shared, longer_row = (plan(model, *row, mean_tokens=2048, image_tokens=1024) for row in ((), (longer,)))
    assert (shared.batches.count, shared.batches.images, longer_row.batches.count) == (4, 8, 3)


@pytest.mark.parametrize(
    ("switch", "line"),
    [
        (f"{MEGATRON}recompute_granularity=full", "layer_activations"),
        (f"{MEGATRON}recompute_granularity=selective", "layer_activations"),
        (f"{MEGATRON}sequence_parallel=true", "layer_activations"),
        (f"{MEGATRON}context_parallel_size=2", "layer_activations"),
        (f"{MEGATRON}freeze_vision=true", "vision_activations"),
        ("policy.logprob_chunk_size=256", "output_activations"),
        ("policy.generation.batch_size=4", "cache"),
    ],
)
def test_a_switch_saves_what_it_is_for(model: Model, switch: str, line: str) -> None:
    assert getattr(plan(model, switch).worst, line) < getattr(plan(model).worst, line)


def test_a_supervised_recipe_is_planned_too() -> None:
    recipe = ROOT / "examples" / "recipes" / "vlm_sft-quickstart-1n1g-megatron-tp1.yaml"
    model = f"policy.model_name={ROOT / 'examples' / 'quickstart' / 'policy'}"
    code, output = invoke(str(recipe), model, "--json")
    assert code == 0, output
    tree = json.loads(output)
    assert tree["micro_batches"]["optimizer_steps_per_step"] == 1
    assert "sharing" not in tree  # one response a prompt
    assert tree["stages"][0]["traffic"] == []  # one process


def test_without_network_or_directory_the_error_says_what_to_do() -> None:
    assert "policy.model_name=DIR" in refusal(str(QUICKSTART), "policy.model_name=nobody/nothing")


def test_servers_leave_the_trainers_memory_alone(model: Model) -> None:
    embedded = plan(model)
    servers = plan(
        model, "policy.generation.backend=vllm_server", "policy.generation.vllm_server_cfg.addresses=['http://a:1']"
    )
    for with_engine, without in zip(embedded.stages, servers.stages, strict=True):
        assert without.engine_weights == without.phases["generation"] == 0
        assert with_engine.persistent - without.persistent == with_engine.engine_weights > 0


VLLM = ("policy.generation.backend=vllm", "policy.generation.vllm_cfg.tensor_parallel_size=4")
SHARE = "policy.generation.vllm_cfg.gpu_memory_utilization"


def test_vllm_that_sleeps_takes_its_share_of_the_gpu_in_generation_alone(model: Model) -> None:
    for stage in plan(model, *VLLM, f"{SHARE}=0.4", gpu_memory=100_000_000_000).stages:
        # CUDA graphs stay where they are captured.
        assert stage.engine_weights == ASLEEP
        assert stage.engine_weights + stage.phases["generation"] == 40_000_000_000
        # Its weights, a quarter of the model in bfloat16, are awake while they are replaced.
        assert stage.phases["weight stream"] > 2 * model.numel // 4


def test_vllm_that_does_not_sleep_holds_its_share_throughout(model: Model) -> None:
    asleep, awake = (
        plan(model, *VLLM, f"policy.generation.vllm_cfg.sleep={sleep}", gpu_memory=100_000_000_000)
        for sleep in ("true", "false")
    )
    for with_sleep, without in zip(asleep.stages, awake.stages, strict=True):
        assert without.persistent - with_sleep.persistent == 40_000_000_000 - ASLEEP
        assert without.phases["generation"] == 0


def test_a_share_that_does_not_hold_the_model_is_refused_by_name() -> None:
    code, output = invoke(
        str(PAPER), *PLAIN, VLLM[0], "policy.generation.vllm_cfg.tensor_parallel_size=1", f"{SHARE}=0.1"
    )
    assert code == 1
    assert SHARE in output
    assert "weights take 17." in output


def test_vllm_that_does_not_fit_is_given_less(model: Model) -> None:
    full = plan(model, *VLLM, f"{SHARE}=0.9")
    assert ("policy.generation.vllm_cfg.gpu_memory_utilization=0.8",) in list(changes(full))
    assert not any("batch_size" in override for change in changes(full) for override in change)


QWEN_32B = f"policy.model_name={ROOT / 'examples' / 'models' / 'qwen3-vl-32b'}"


def test_an_embedded_engine_that_does_not_fit_is_offered_another() -> None:
    """A 32B holds 67 GB in every process that embeds it, whatever the layout: no layout helps, and vLLM does."""
    big = ["cluster.num_nodes=16", "policy.megatron_cfg.tensor_model_parallel_size=8", *PLAIN[2:], QWEN_32B]
    code, output = invoke(str(PAPER), CONFIG, *big, "--json")
    verdict = json.loads(output)["verdict"]
    assert (code, verdict["fits"]) == (1, False)
    overrides = verdict["change"]["overrides"]
    assert any(override.startswith("policy.generation.backend=vllm") for override in overrides), overrides
    assert verdict["change"]["peak"] <= 80e9


def test_servers_are_among_the_changes_of_every_engine_in_the_process(model: Model) -> None:
    for engine in ((), VLLM):
        offered = list(changes(plan(model, *engine)))
        assert any("policy.generation.backend=vllm_server" in change for change in offered)
    addresses = "policy.generation.vllm_server_cfg.addresses=['http://a:1']"
    servers = plan(model, "policy.generation.backend=vllm_server", addresses)
    assert not any("backend" in override for change in changes(servers) for override in change)


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--mean-tokens", "0", "--mean-tokens 0 is not in 1..policy.max_total_sequence_length"),
        ("--response-tokens", "-1", "--response-tokens -1 does not fit: a sequence of"),
        ("--image-tokens", "99999", "--image-tokens 99999 does not fit into a prompt"),
    ],
)
def test_a_sweep_names_an_argument_that_no_layout_can_be_planned_with(option: str, value: str, says: str) -> None:
    code, output = invoke(str(PAPER), CONFIG, "--sweep", option, value)
    assert code == 1
    assert says in output
    assert "No layout fits" not in output
