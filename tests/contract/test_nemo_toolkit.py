# SPDX-License-Identifier: Apache-2.0
"""Claim: ``exp_manager`` has the fields of nemo-toolkit's ``ExpManagerConfig``, all of them, and knows their defaults.

By the dataclasses' source, see ``dataclass_fields.py``; nemo-toolkit is not imported. What a field means there is read,
not run.
"""

from __future__ import annotations

import ast
from typing import Any

import pytest

from megatron_g2rpo.recipe.exp_manager import FIELDS, Becomes, Only, translate
from tests.contract.dataclass_fields import read

VERSION = "3.0.0"
RELEASE = read("nemo_toolkit", VERSION)
# Where a rule is a mapping: the dataclass of the field.
NESTED = {
    "checkpoint_callback_params": "CallbackParams",
    "step_timing_kwargs": "StepTimingParams",
    "ema": "EMAParams",
}
# Fields whose default is refused where it is written down: it asks for what no run here does. nemo-toolkit's default
# section, written out in full, is therefore no section for us.
REFUSED_DEFAULTS = {
    "resume_if_exists",
    "resume_ignore_no_checkpoint",
    "checkpoint_callback_params.every_n_epochs",
}
RULES = {
    **{(None, name): rule for name, rule in FIELDS.items()},
    **{
        (nested, name): rule
        for nested in NESTED
        for name, rule in FIELDS[nested].items()  # type: ignore[union-attr]
    },
}


def declared(nested: str | None, name: str) -> tuple[str, str]:
    return RELEASE[NESTED[nested] if nested else "ExpManagerConfig"][name]


def default(nested: str | None, name: str) -> Any:
    return ast.literal_eval(declared(nested, name)[1])


@pytest.mark.parametrize("nested", [None, *NESTED])
def test_every_field_has_a_rule_and_every_rule_a_field(nested: str | None) -> None:
    rules: Any = FIELDS if nested is None else FIELDS[nested]
    assert rules.keys() == RELEASE[NESTED[nested] if nested else "ExpManagerConfig"].keys()


@pytest.mark.parametrize(("nested", "name"), NESTED.items())
def test_a_mapping_is_the_dataclass_that_we_take_it_for(nested: str, name: str) -> None:
    assert declared(None, nested)[0] == f"Optional[{name}]"


ONLY = [key for key, rule in RULES.items() if isinstance(rule, Only)]


@pytest.mark.parametrize(("nested", "name"), ONLY, ids=[".".join(filter(None, key)) for key in ONLY])
def test_the_default_of_what_cannot_be_changed_is_accepted(nested: str | None, name: str) -> None:
    value = default(nested, name)
    faults = translate({nested: {name: value}} if nested else {name: value}).faults
    dotted = f"{nested}.{name}" if nested else name
    assert bool(faults) == (dotted in REFUSED_DEFAULTS), faults


@pytest.mark.parametrize(
    ("nested", "name", "value"),
    [(*key, value) for key, rule in RULES.items() if isinstance(rule, Only) for value in rule.values],
)
def test_what_is_accepted_has_the_fields_type(nested: str | None, name: str, value: object) -> None:
    kind = declared(nested, name)[0].removeprefix("Optional[").removesuffix("]").partition("[")[0]
    known = {"bool": bool, "str": str, "int": int, "float": (float, int), "Dict": dict, "List": list, "Any": object}
    assert isinstance(value, known[kind])
    assert isinstance(value, bool) == (kind == "bool")


def test_what_becomes_a_key_has_the_keys_type() -> None:
    kinds = {
        ".".join(filter(None, key)): declared(*key)[0].removeprefix("Optional[").removesuffix("]")
        for key, rule in RULES.items()
        if isinstance(rule, Becomes)
    }
    params = "checkpoint_callback_params"
    text = ("explicit_log_dir", "exp_dir", "name", "version", "max_time_per_run")
    assert kinds == {
        **dict.fromkeys((*text, f"{params}.dirpath", f"{params}.monitor", f"{params}.mode"), "str"),
        **dict.fromkeys(("create_tensorboard_logger", "create_checkpoint_callback"), "bool"),
        **dict.fromkeys((f"{params}.async_save", f"{params}.save_nemo_on_train_end"), "bool"),
        **dict.fromkeys((f"{params}.save_top_k", f"{params}.every_n_train_steps"), "int"),
    }


def test_a_metric_without_a_direction_would_be_a_loss_there() -> None:
    """Which is why ``monitor`` without ``mode`` is refused: a reward would be kept where it is lowest."""
    assert default("checkpoint_callback_params", "mode") == "min"
