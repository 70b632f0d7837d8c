# SPDX-License-Identifier: Apache-2.0
"""Claim: docs/coming-from.md sends nobody to a key that does not exist, and leaves no field of ``exp_manager`` out.

Not tested: that their keys are theirs. They were read at the commits that the page names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_g2rpo import recipe, registry
from megatron_g2rpo.objective import estimators, surrogates  # noqa: F401  (they register themselves)
from megatron_g2rpo.recipe.exp_manager import CHECKPOINT_CALLBACK_PARAMS, FIELDS
from megatron_g2rpo.recipe.keys import dotted_keys
from megatron_g2rpo.recipe.schema import TrainRecipe
from tests.common.recipes import G2RPO

PAGE = (Path(__file__).parents[2] / "docs" / "coming-from.md").read_text()
QUOTED = re.compile(r"`([^`]+)`")
PEERS = ("NeMo-RL", "verl", "EasyR1")
KEYS = set(dotted_keys(TrainRecipe))
KEYS |= {f"loss_fn.{option}" for name in registry.surrogates.names() for option in registry.surrogates.options(name)}


def section(heading: str) -> str:
    return re.split(r"^## ", PAGE, flags=re.MULTILINE)[[*PEERS, "`exp_manager`", "nemo-run"].index(heading) + 1]


def rows(heading: str) -> list[list[str]]:
    lines = [line for line in section(heading).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def unknown(cells: list[str]) -> Iterator[str]:
    """Keys that the cells name and that no recipe has."""
    for quoted in (each for cell in cells for each in QUOTED.findall(cell)):
        key = quoted.split(":")[0]
        if key not in KEYS:
            yield key


@pytest.mark.parametrize("peer", PEERS)
def test_every_key_of_ours_exists(peer: str) -> None:
    assert len(rows(peer)) > 30
    assert len(VALUES) > 10
    assert list(unknown([row[1] for row in rows(peer)])) == []


# Of NeMo-RL's examples/configs/vlm_grpo_3B.yaml: what has no counterpart must be said, too.
@pytest.mark.parametrize(
    "name",
    [
        *("use_on_policy_kl_approximation", "policy.tokenizer", "generation_batch_size", "stop_token_ids"),
        *(
            "async_engine",
            "vllm_cfg.precision",
            "params_dtype",
            "start_weight_decay",
            "lr_warmup_init",
            "converter_type",
        ),
        *("shuffle", "split", "max_input_seq_length", "monitor_gpus", "average_in_collective", "pipeline_dtype"),
    ],
)
def test_keys_without_a_counterpart_are_to_be_deleted(name: str) -> None:
    (deleted,) = [row[0] for row in rows("NeMo-RL") if row[2].startswith("delete these")]
    assert name in deleted


def test_the_keys_of_exp_manager_exist() -> None:
    written = [key for row in rows("`exp_manager`") for key in QUOTED.findall(row[1]) if "." in key]
    assert [key for key in written if key.split(".")[0] in TrainRecipe.model_fields and key not in KEYS] == []
    assert len(written) > 10


def test_a_key_that_is_gone_would_be_noticed() -> None:
    assert list(unknown(["`grpo.max_num_step`, `loss_fn.name: gspo`", "`loss_fn.ratio_clip`"])) == [
        "grpo.max_num_step",
        "loss_fn.ratio_clip",
    ]


VALUES = sorted({each for peer in PEERS for row in rows(peer) for each in QUOTED.findall(row[1]) if ": " in each})


@pytest.mark.parametrize("value", VALUES)
def test_a_value_that_the_page_gives_is_taken(value: str) -> None:
    recipe.load(G2RPO, [value.replace(": ", "=")], "train")


def test_every_field_of_exp_manager_is_there() -> None:
    named = {each for row in rows("`exp_manager`") for cell in row for each in QUOTED.findall(cell)}
    listed = {name for name in FIELDS if name not in named}
    assert listed == set()
    # Those that become a key; "the other fields" are the rest.
    translated = {name for name, rule in CHECKPOINT_CALLBACK_PARAMS.items() if hasattr(rule, "key")}
    assert translated <= named


def test_the_example_of_exp_manager_is_a_recipe(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```", section("`exp_manager`"), re.MULTILINE | re.DOTALL)
    path = tmp_path / "recipe.yaml"
    path.write_text(block)
    loaded = recipe.load(path, [], "train")
    assert loaded.logger.log_dir == "/shared/runs/qwen3vl-2b"
