# SPDX-License-Identifier: Apache-2.0
"""Claim: the engine of a run gets every token that ends a response, as the model directory names them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_g2rpo.data.processing import ChatProcessor
from megatron_g2rpo.policy.device import select
from megatron_g2rpo.rollout.transformers.engine import TransformersEngine
from megatron_g2rpo.train.assembly import engine_for
from tests.common.policy_layout import policy_section

POLICY = Path(__file__).parents[3] / "examples" / "quickstart" / "policy"


@pytest.mark.parametrize(("named", "expected"), [([431, 432], [431, 432]), (432, [431, 432]), (431, [431])])
def test_the_engine_ends_at_every_token_that_the_directory_names(tmp_path, named, expected):
    model = Path(shutil.copytree(POLICY, tmp_path / "model"))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    processor = ChatProcessor(model)
    banned = processor.banned_token_ids(processor.vocab_size)
    engine = engine_for(policy_section(model), processor, select("cpu"), banned)
    assert isinstance(engine, TransformersEngine)
    assert engine._eos.tolist() == expected
