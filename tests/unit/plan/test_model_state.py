# SPDX-License-Identifier: Apache-2.0
"""Claim: weights, gradients and optimizer state of a plan are those of the real policy, to the byte.

One process; tests/unit/plan/test_ranks.py says the same of several.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_g2rpo.plan.buffers import DataParallelism, ddp_buffer, model_state
from megatron_g2rpo.plan.model import Model, ModelConfigError, Parameter, read_config
from megatron_g2rpo.policy.layouts.layout import Layout
from tests.common.tiny_model import make_tiny_qwen3vl
from tests.unit.plan.measured import (
    MEGATRON,
    REDUCTION,
    batch_of,
    policy_of,
    shape_of,
    state_bytes,
    tiny_recipe,
    toy_loss,
)

QWEN3_VL_8B = Path(__file__).parents[3] / "examples" / "models" / "qwen3-vl-8b"

CASES = {
    "float32": [],
    "bfloat16": ["policy.precision=bfloat16"],
    "bfloat16 gradients": ["policy.precision=bfloat16", f"{REDUCTION}grad_reduce_in_fp32=false"],
    "frozen vision": ["policy.precision=bfloat16", f"{MEGATRON}freeze_vision=true"],
    "distributed optimizer": ["policy.precision=bfloat16", f"{REDUCTION}use_distributed_optimizer=true"],
    "distributed optimizer, frozen vision, float32": [
        "policy.precision=float32",
        f"{MEGATRON}freeze_vision=true",
        f"{REDUCTION}use_distributed_optimizer=true",
        f"{REDUCTION}overlap_grad_reduce=true",
    ],
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("case", CASES)
def test_state_is_that_of_the_real_policy(tmp_path: Path, case: str, tied: bool) -> None:
    # Odd sizes, so that padding to 64 elements is seen.
    config, _ = make_tiny_qwen3vl(tmp_path, tied=tied, vocab=167, intermediate=90)
    precision = [] if any("precision" in override for override in CASES[case]) else ["policy.precision=float32"]
    recipe = tiny_recipe(tmp_path, *precision, *CASES[case])
    policy = policy_of(recipe)
    policy.update([batch_of(config, Layout(), ((), ((4, 6),)), 9, 5)], toy_loss)
    layout, parallelism = shape_of(recipe)
    model = Model(read_config(str(tmp_path)))
    parameters = model.stage_parameters(layout, 0, freeze_vision=recipe.policy.megatron_cfg.freeze_vision)
    nbytes = 4 if recipe.policy.precision == "float32" else 2
    planned = model_state(parameters, parallelism, 0, nbytes=nbytes)
    assert (planned.weights, planned.gradients, planned.optimizer) == state_bytes(policy)


def test_parameters_are_those_of_the_real_policy_in_its_order(tmp_path: Path) -> None:
    make_tiny_qwen3vl(tmp_path, layers=12, deepstack=(0, 2))
    policy = policy_of(tiny_recipe(tmp_path, "policy.precision=float32"))
    planned = Model(read_config(str(tmp_path))).stage_parameters(Layout(), 0, freeze_vision=False)
    real = [(name, parameter.numel()) for name, parameter in policy.model.named_parameters()]
    assert [(parameter.name, parameter.numel) for parameter in planned] == real


def test_the_published_architecture_has_the_published_size() -> None:
    """huggingface.co/Qwen/Qwen3-VL-8B-Instruct: 8.77 B parameters, 576.4 M of them in the vision tower."""
    model = Model(read_config(str(QWEN3_VL_8B)))
    parameters = model.stage_parameters(Layout(), 0, freeze_vision=False)
    vision = sum(parameter.numel for parameter in parameters if parameter.is_vision)
    assert model.numel == sum(parameter.numel for parameter in parameters)
    assert round(model.numel / 1e9, 2) == 8.77
    assert round(vision / 1e6, 1) == 576.4


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 3), (2, 2), (4, 2)])
def test_stages_and_shards_hold_the_whole_model(tmp_path: Path, tied: bool, tensor: int, pipeline: int) -> None:
    config, _ = make_tiny_qwen3vl(tmp_path, tied=tied, layers=6, vocab=168, deepstack=(0,))
    model = Model(config)
    layout = Layout(tensor=tensor, pipeline=pipeline)
    stages = [model.stage_parameters(layout, stage, freeze_vision=False) for stage in range(pipeline)]
    whole = sum(p.numel * (1 if p.replicated else tensor) for stage in stages for p in stage)
    copy = 168 * config.text_config.hidden_size if tied else 0  # the last stage's own embedding
    assert whole == model.numel + copy
    shared = [[p.name for p in stage if p.shared] for stage in stages]
    ends = (["language_model.embedding.word_embeddings.weight"], ["language_model.output_layer.weight"])
    assert (shared[0], shared[-1]) == (ends if tied else ([], []))


@given(
    numels=st.lists(st.integers(1, 500), min_size=1, max_size=12),
    size=st.sampled_from([1, 2, 3, 8]),
    shared=st.integers(0, 11),
)
def test_every_element_is_updated_by_one_rank(numels: list[int], size: int, shared: int) -> None:
    parameters = [
        Parameter(str(i), numel, replicated=False, trains=i % 4 != 3, shared=i == shared, sequence_parallel=False)
        for i, numel in enumerate(numels)
    ]
    parallelism = DataParallelism(
        size=size, data=size, distributed_optimizer=True, overlap_grad_reduce=False, grad_bytes=4
    )
    buffer = ddp_buffer(parameters, parallelism, 0)
    owned = sum(sum(buffer.owned(rank, size)) for rank in range(size))
    assert owned == sum(parameter.numel for parameter in parameters if parameter.trains)
    assert all(start % 64 == 0 for start, _ in buffer.spans)
    assert all((end - start) % size == 0 and end % 128 == 0 for start, end in buffer.buckets)
    assert all(earlier[1] == later[0] for earlier, later in itertools.pairwise(buffer.buckets))


def test_without_a_model_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ModelConfigError, match=r"policy\.model_name=DIR.*config\.json"):
        read_config("nobody/has-this-model")
    with pytest.raises(ModelConfigError, match=r"no config\.json"):
        read_config(str(tmp_path))


@given(
    numels=st.lists(st.integers(1, 500), min_size=1, max_size=12),
    size=st.sampled_from([1, 2, 3, 8]),
    shared=st.integers(0, 11),
    overlap=st.booleans(),
)
def test_the_most_that_a_rank_updates_is_the_largest_of_all_ranks_counts(
    numels: list[int], size: int, shared: int, overlap: bool
) -> None:
    parameters = [
        Parameter(str(i), 100_000 * numel, replicated=False, trains=i != 3, shared=i == shared, sequence_parallel=False)
        for i, numel in enumerate(numels)
    ]
    parallelism = DataParallelism(
        size=size, data=size, distributed_optimizer=True, overlap_grad_reduce=overlap, grad_bytes=4
    )
    buffer = ddp_buffer(parameters, parallelism, 0)
    assert buffer.most_owned(size) == max(sum(buffer.owned(rank, size)) for rank in range(size))
