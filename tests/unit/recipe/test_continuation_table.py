# SPDX-License-Identifier: Apache-2.0
"""Claim: docs/faults.md says of every key of a recipe whether a continuation may change it, as the code decides it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_g2rpo import recipe as recipes
from megatron_g2rpo.recipe.identity import NOT_IDENTITY

PAGE = Path(__file__).parents[3] / "docs" / "faults.md"
JUDGE = "env.reward_options={judge: {model: m, addresses: [a]}}"
ROW = re.compile(r"^\| (`.*?) \| .*\|$", re.MULTILINE)


def keys_of_recipes() -> set[str]:
    """Every key of a recipe, of both loops and of what is optional in one."""
    train = recipes.load(recipes.EXEMPLARS / "vlm_g2rpo.yaml", ["env.tasks={any: {}}", JUDGE], "train")
    sft = recipes.load(recipes.EXEMPLARS / "vlm_sft.yaml", ["env.tasks={any: {}}"], "sft")
    variables = {"policy.megatron_cfg.env_vars.NVTE_DEBUG", "policy.megatron_cfg.env_vars.NCCL_DEBUG"}
    return set(recipes.settings(train)) | set(recipes.settings(sft)) | set(NOT_IDENTITY) | variables


def patterns(page: str, heading: str) -> list[str]:
    """What the table under a heading names; a star at the end stands for whatever follows."""
    table = page[page.index(f"| {heading}") :].partition("\n\n")[0]
    return [name for row in ROW.findall(table) for name in re.findall(r"`([^`]+)`", row)]


def covers(pattern: str, key: str) -> bool:
    if pattern.endswith("*"):
        return key.startswith(pattern[:-1]) or key == pattern[:-2]
    return key == pattern or key.startswith(f"{pattern}.")


def wrong(page: str) -> list[str]:
    """What the page says otherwise than the code, or of nothing."""
    said = dict.fromkeys(patterns(page, "may change"), True) | dict.fromkeys(patterns(page, "may not change"), False)
    keys, faults = keys_of_recipes(), []
    for key in sorted(keys):
        # The longest name that covers a key is the one that counts.
        name = max((name for name in said if covers(name, key)), key=len, default=None)
        if name is None or said[name] != recipes.may_change(key):
            faults.append(f"{key}: {'may' if recipes.may_change(key) else 'may not'} change, the page: {name}")
    faults += [f"{name} names no key" for name in said if not any(covers(name, key) for key in keys)]
    return faults


def test_the_table_says_of_every_key_what_the_code_decides() -> None:
    assert wrong(PAGE.read_text()) == []


@pytest.mark.parametrize(
    ("was", "becomes"),
    [("`data.max_pixels`", "`data.max_pixel`"), ("`grpo.*`", "`grpo.seed`"), ("`logger.*`", "`logger.*`, `grpo.seed`")],
)
def test_a_table_that_is_wrong_is_noticed(was: str, becomes: str) -> None:
    page = PAGE.read_text()
    assert page.count(was) == 1
    assert wrong(page.replace(was, becomes))
