# SPDX-License-Identifier: Apache-2.0
"""Claim: what the nemo-run example passes to nemo-run exists in the release that it is tested with.

By source, see ``dataclass_fields.py``, where nemo-run is not installed; ``make test-nemo-run`` runs the example.
"""

from __future__ import annotations

import ast

import pytest

from megatron_g2rpo.commands.doctor.lock import read_lock
from tests.contract.dataclass_fields import Fields, read
from tests.contract.signatures import HERE

VERSION = "0.11.1"
ROOT = HERE.parents[1]
LAUNCH = ast.parse((ROOT / "examples" / "nemo_run" / "launch.py").read_text())
RELEASE = read("nemo_run", VERSION)
TAKES: dict[str, Fields] = {
    "SlurmExecutor": RELEASE["Executor"] | RELEASE["SlurmExecutor"],
    "LocalTunnel": RELEASE["Tunnel"] | RELEASE["LocalTunnel"],
    "Script": RELEASE["Script"],
}


@pytest.mark.parametrize("name", TAKES)
def test_it_is_called_with_fields_that_it_has(name: str) -> None:
    calls = [node for node in ast.walk(LAUNCH) if isinstance(node, ast.Call) and ast.unparse(node.func) == name]
    passed = {keyword.arg for call in calls for keyword in call.keywords}
    assert passed
    assert passed <= {field for field, (_, default) in TAKES[name].items() if "init=False" not in default}


def test_the_release_is_that_of_the_environment() -> None:
    assert f"nemo-run=={VERSION} " in (ROOT / "Makefile").read_text()
    assert read_lock(ROOT / "constraints" / "nemo-run.txt")["nemo-run"] == VERSION
