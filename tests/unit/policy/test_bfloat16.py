# SPDX-License-Identifier: Apache-2.0
"""Claims: in bf16 the policy computes what bf16 transformers does, with fp32 rotary tables and fp32 main copies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from megatron_g2rpo.data.packing import response_values
from megatron_g2rpo.policy.device import select
from megatron_g2rpo.policy.megatron import MegatronPolicy
from tests.common.layout_parity import Case, check_layout_parity, prepare
from tests.common.parity import packer_for, random_sequences, reference, toy_loss
from tests.common.policy_layout import layout_options
from tests.common.tiny_model import hf_logits, make_tiny_qwen3vl

# bf16 keeps 8 bits of a number, and logits here are around 5: one rounding is 0.02.
ROUNDING = 0.02
# What bf16 costs this model on average, by transformers' own measure (0.02 to 0.04 over seeds).
MEAN_ERROR = 0.05


@pytest.fixture
def policy(tmp_path: Path) -> MegatronPolicy:
    make_tiny_qwen3vl(tmp_path)
    section = layout_options(tmp_path, precision="bfloat16", lr=1e-4)
    return MegatronPolicy(section, select("cpu"), seed=0, max_steps=10)


def main_copies(policy: MegatronPolicy) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Name, bf16 weight and fp32 main copy of every parameter."""
    return [(name, parameter, parameter.main_param) for name, parameter in policy.model.named_parameters()]


def test_log_probabilities_are_those_of_transformers(policy: MegatronPolicy) -> None:
    config, model = make_tiny_qwen3vl()
    sequences = random_sequences(config)
    exact, _ = reference(model, sequences, temperature=1.0)
    # Loaded, not cast: `.to(bfloat16)` would round the rotary tables.
    rounded = AutoModelForImageTextToText.from_pretrained(policy.settings.model_name, dtype=torch.bfloat16)
    batches = packer_for(config).pack(sequences, budget=80)
    errors = []
    for batch, stats in zip(batches, policy.logprobs(batches), strict=True):
        assert stats.logprobs.dtype == stats.entropy.dtype == torch.float32
        for row, mine in response_values(batch, stats.logprobs).items():
            sequence = sequences[row]
            with torch.no_grad():
                logits = hf_logits(rounded, sequence.inputs, sequence.response_ids)
            response = logits[len(sequence.inputs.token_ids) - 1 : -1].float().log_softmax(-1)
            theirs = response.gather(1, sequence.response_ids[:, None]).squeeze(1)
            torch.testing.assert_close(mine, theirs, atol=ROUNDING, rtol=0)
            errors.append((mine - exact[row]).abs())
    assert torch.cat(errors).mean() < MEAN_ERROR


def test_rotary_frequencies_are_not_rounded(policy: MegatronPolicy) -> None:
    _, model = make_tiny_qwen3vl()
    assert {parameter.dtype for parameter in policy.model.parameters()} == {torch.bfloat16}
    expected = dict(model.model.visual.named_buffers())
    assert expected, "the vision tower has no rotary buffer: this test looks for it in the wrong place"
    tower = policy.model.vision_model
    assert tower is not None
    for name, buffer in tower.named_buffers():
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, expected[name])
    theirs = model.model.language_model.rotary_emb.inv_freq
    assert torch.equal(policy.model.rotary_pos_emb.inv_freq, theirs)


def test_an_update_moves_the_main_copies_and_the_weights_follow(policy: MegatronPolicy) -> None:
    config, _ = make_tiny_qwen3vl()
    batches = packer_for(config).pack(random_sequences(config), budget=80)
    before = {name: (weight.clone(), main.clone()) for name, weight, main in main_copies(policy)}
    policy.update(batches, toy_loss)
    moved = 0
    for name, weight, main in main_copies(policy):
        assert main.dtype == torch.float32
        assert not torch.equal(main, before[name][1]), f"the main copy of {name} did not move"
        assert torch.equal(weight, main.bfloat16()), f"{name} is not its rounded main copy"
        moved += not torch.equal(weight, before[name][0])
    # A step of 1e-4 is below half a bf16 ulp of most weights; without main copies it would be lost for good.
    assert moved > 0


def test_load_takes_the_main_copies_along(policy: MegatronPolicy) -> None:
    """Negative side: stale main copies would undo the load at the next step."""
    _, other = make_tiny_qwen3vl(seed=3)
    state = {name: tensor for name, tensor in other.state_dict().items() if name != "lm_head.weight"}
    stale = [main.clone() for _, _, main in main_copies(policy)]
    policy.load(state, source="a test")
    for (name, weight, main), old in zip(main_copies(policy), stale, strict=True):
        assert torch.equal(main, weight.float()), f"the main copy of {name} was left behind"
        assert not torch.equal(main, old)


@pytest.mark.parametrize(
    "case",
    [Case(shape="tied", precision="bfloat16"), Case(shape="untied", precision="bfloat16", distributed_optimizer=True)],
    ids=str,
)
def test_gradients_are_as_near_to_float32_as_those_of_transformers(tmp_path: Path, case: Case) -> None:
    prepare(tmp_path, case)
    report = check_layout_parity(tmp_path, select("cpu"), case)
    print(f"parity [{case}]: {report}")
    report.assert_within_tolerance()
