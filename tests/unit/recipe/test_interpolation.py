# SPDX-License-Identifier: Apache-2.0
"""Interpolation and its arithmetic."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_g2rpo.recipe.errors import Origin, RecipeError
from megatron_g2rpo.recipe.interpolation import resolve


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${a.n}", 6),
        ("${.sibling}", "s"),
        ("${a.text}/checkpoints", "runs/checkpoints"),
        ("${add:${a.n},0.5}", 6.5),
        ("${sub:${a.n},8}", -2),
        ("${mul:${a.n},${a.n}}", 36),
        ("${div:${a.n},3}", 2),
        ("${div:${a.n},4}", 1.5),
        ("${max:${a.n},${mul:2,4}}", 8),
        ("${oc.env:RECIPE_TEST_VARIABLE}", "from the environment"),
        ("${a}", {"n": 6, "text": "runs"}),
    ],
)
def test_interpolation(monkeypatch: pytest.MonkeyPatch, text: str, value: object) -> None:
    monkeypatch.setenv("RECIPE_TEST_VARIABLE", "from the environment")
    tree: dict[str, Any] = {"a": {"n": 6, "text": "runs"}, "b": {"sibling": "s", "key": text}}
    resolved = resolve(tree, {})["b"]["key"]
    assert (resolved, type(resolved)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("${a.nothing}", "Interpolation key 'a.nothing' not found"),
        ("${nothing:1}", "Unsupported interpolation type nothing"),
        ("${a.n", "no viable alternative"),
        ("${b.key}", "Recursive interpolation"),
        ("${mul:text,2}", "expected Union"),
        ("${div:1,0}", "ZeroDivisionError"),
        ("${oc.env:RECIPE_TEST_UNSET}", "RECIPE_TEST_UNSET"),
        ("???", r"must be given: it is \?\?\? in the recipe"),
    ],
)
def test_what_cannot_be_resolved_names_the_key_and_its_line(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        resolve({"a": {"n": 6}, "b": {"key": text}}, {"b.key": Origin("recipe.yaml", 4)})
    assert str(error.value).startswith("recipe.yaml:4: 'b.key': ")


def test_a_fault_inside_a_list_is_traced_to_the_list() -> None:
    with pytest.raises(RecipeError, match=r"recipe\.yaml:4: 'b\.1': "):
        resolve({"b": [1, "${nothing}"]}, {"b": Origin("recipe.yaml", 4)})
