# SPDX-License-Identifier: Apache-2.0
"""What ``on_a_card`` measures on one GPU: parity with transformers, and time and memory beside what ``plan`` says.

Times include a synchronisation with the device at their end. Memory is ``torch.cuda.max_memory_allocated``: what
PyTorch's allocator handed out, without the CUDA context and the libraries' own, which ``plan`` allows for apart.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.convert import CONFIG
from megatron_g2rpo import recipe as recipes
from megatron_g2rpo.data.packing import Packer, PackSequence
from megatron_g2rpo.plan.model import Model, read_config
from megatron_g2rpo.plan.planner import Plan, make_plan
from megatron_g2rpo.policy.device import Device
from megatron_g2rpo.policy.layouts.layout import token_multiples
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.train.assembly import assemble
from megatron_g2rpo.train.g2rpo import g2rpo_step
from megatron_g2rpo.train.step.losses import sft_loss
from megatron_g2rpo.types import ModelInputs
from tests.common.layout_parity import Case, check_layout_parity, prepare

QUICKSTART = Path("examples/recipes/vlm_g2rpo-quickstart-1n1g-megatron-tp1.yaml")
SMALL = Path("examples/quickstart/policy")


@dataclass(frozen=True)
class Measured:
    """Time and memory of one thing that ran.

    Attributes:
        what: what ran.
        seconds: of a step, the median of those after the first.
        tokens_per_second: of a step, tokens that it trained on.
        peak: largest allocated bytes.
        planned: what ``plan`` says of them: its peak without its allowance.
    """

    what: str
    seconds: float
    tokens_per_second: float
    peak: int
    planned: int


def layer_keys(*, engine: bool) -> list[str]:
    """Return the overrides that choose Transformer Engine's layers and attention, or the local ones."""
    impl = "transformer_engine" if engine else "local"
    return [f"policy.megatron_cfg.{key}={impl}" for key in ("transformer_impl", "core_attention")]


def parity(directory: Path, device: Device, *, engine: bool) -> list[dict[str, Any]]:
    """Compare the policy with transformers on the CPU.

    Args:
        directory: scratch folder for models and references.
        device: the GPU.
        engine: whether Transformer Engine is there.

    Returns:
        A dictionary for each case and kind of error: ``case``, ``kind``, ``error``, ``tolerance``.
    """
    cases = [Case(impl="local", shape="tied")]
    if engine:
        cases += [
            Case(impl="transformer_engine", shape="tied"),
            Case(impl="transformer_engine", precision="bfloat16", shape="tied"),
        ]
    rows = []
    for case in cases:
        prepare(directory, case)
        report = check_layout_parity(directory, device, case)
        rows += [
            {"case": f"{case.impl}, {case.precision}", "kind": kind, "error": error, "tolerance": limit}
            for kind, limit in report.tolerances.items()
            for error, _ in [report.worst[kind]]
        ]
    return rows


def quickstart(device: Device, steps: int, *, engine: bool, small: bool) -> Measured:
    """Run steps of the quickstart's recipe in bfloat16, generation and scoring included.

    Args:
        device: the GPU.
        steps: number of steps.
        engine: whether the policy has Transformer Engine's layers.
        small: take 16 rollouts a step in place of the recipe's.

    Raises:
        RecipeError: its data is not there (``make data``).
    """
    overrides = [
        "policy.precision=bfloat16",
        f"grpo.max_num_steps={steps}",
        "cluster.device=gpu",
        "checkpointing.enabled=false",
        *layer_keys(engine=engine),
    ]
    if small:
        sizes = {"grpo.num_prompts_per_step": 4, "grpo.num_generations_per_prompt": 4}
        overrides += [f"{key}={size}" for key, size in {**sizes, "policy.train_global_batch_size": 16}.items()]
    recipe = recipes.load(QUICKSTART, overrides, "train")
    torch.cuda.reset_peak_memory_stats()
    seconds, tokens = [], []
    with assemble(recipe) as components:
        for step in range(1, steps + 1):
            start = time.perf_counter()
            line = g2rpo_step(recipe, components, step)
            device.synchronize()
            seconds.append(time.perf_counter() - start)
            tokens.append(line["train/num_tokens"])
    median = statistics.median(seconds[1:])
    peak = torch.cuda.max_memory_allocated()
    plan = make_plan(recipe, Model(read_config(str(SMALL))))
    rate = statistics.fmean(tokens[1:]) / median
    what = f"quickstart{', 16 rollouts a step' if small else ''}, {_layers(engine)}, response tokens"
    return Measured(what, median, rate, peak, _without_allowance(plan))


def random_policy(directory: Path, device: Device, steps: int, *, engine: bool, small: bool) -> Measured | None:
    """Run optimizer steps of a policy with random weights on full rows of text, without an engine beside it.

    Args:
        directory: scratch folder for the model's directory.
        device: the GPU.
        steps: number of optimizer steps.
        engine: whether it has Transformer Engine's layers.
        small: take the quickstart's shape in place of Qwen3-VL-2B's.

    Returns:
        None where the GPU's memory is less than ``plan`` asks for.
    """
    model = directory / "model"
    model.mkdir()
    config = json.loads((SMALL / "config.json").read_text()) if small else CONFIG
    (model / "config.json").write_text(json.dumps(config))
    row = 1024 if small else 8192
    overrides = [
        f"policy.model_name={model}",
        "policy.init=random",
        "policy.precision=bfloat16",
        f"policy.max_total_sequence_length={row // 4}",
        f"policy.sequence_packing.train_mb_tokens={row}",
        f"policy.generation.max_new_tokens={row // 8}",
        "policy.train_global_batch_size=8",
        "data.train.path=unused",
        "cluster.device=gpu",
        "env.tasks={any: {}}",
        *layer_keys(engine=engine),
    ]
    recipe = recipes.load(recipes.EXEMPLARS / "vlm_sft.yaml", overrides, "sft")
    plan = make_plan(recipe, Model(read_config(str(model))), row // 4, 0)
    if not plan.fits(torch.cuda.get_device_properties(device.torch_device).total_memory):
        return None
    torch.cuda.reset_peak_memory_stats()
    policy = MegatronPolicy(recipe.policy, device, seed=0, max_steps=steps)
    hf: Any = policy.hf_config
    packer = Packer(hf.image_token_id, hf.vision_config.spatial_merge_size, 0, *token_multiples(policy.layout))
    rows = packer.pack(_texts(hf, count=8, tokens=row // 4), row)
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        policy.update(rows, sft_loss)
        device.synchronize()
        seconds.append(time.perf_counter() - start)
    median, tokens = statistics.median(seconds[1:]), sum(batch.tokens.numel() for batch in rows)
    shape = "the quickstart's shape" if small else "Qwen3-VL-2B's shape"
    what = f"update, {shape}, {_layers(engine)}, tokens of rows of {row}"
    return Measured(what, median, tokens / median, torch.cuda.max_memory_allocated(), _without_allowance(plan))


def _layers(engine: bool) -> str:
    return "Transformer Engine's layers" if engine else "local layers"


def _texts(config: Any, count: int, tokens: int) -> list[PackSequence]:
    """Random prompts of a quarter of the tokens, with their responses."""
    generator = torch.Generator().manual_seed(0)
    vision, words = config.vision_config, min(400, config.text_config.vocab_size)
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    no_image = {"pixel_values": torch.zeros(0, patch), "image_grid_thw": torch.zeros(0, 3, dtype=torch.int64)}
    return [
        PackSequence(
            inputs=ModelInputs(token_ids=torch.randint(words, (tokens // 4,), generator=generator), **no_image),
            response_ids=torch.randint(words, (tokens - tokens // 4,), generator=generator),
        )
        for _ in range(count)
    ]


def _without_allowance(plan: Plan) -> int:
    return plan.worst.peak - plan.worst.allowance
