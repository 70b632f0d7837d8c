# SPDX-License-Identifier: Apache-2.0
"""Claim: no file of a model or checkpoint is run, nor does anything ask whether to.

That transformers and torch do not by these arguments: tests/unit/data/test_model_directories.py and
tests/unit/weights/test_megatron_checkpoint.py.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Method or function -> the argument that must be there, and its value.
NEEDED = {
    "from_pretrained": ("trust_remote_code", False),
    "from_config": ("trust_remote_code", False),
    "torch.load": ("weights_only", True),
}


def faults(source: str) -> Iterator[tuple[int, str]]:
    """Calls, by line, that could run what a file says."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        needed = NEEDED.get(node.func.attr) or NEEDED.get(ast.unparse(node.func))
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if needed is not None:
            name, value = needed
            found = given.get(name)
            if not (isinstance(found, ast.Constant) and found.value is value):
                yield node.lineno, ast.unparse(node.func)


def test_every_call_that_could_run_a_directory_s_code_says_that_it_must_not() -> None:
    files = [file for folder in ("megatron_g2rpo", "examples", "benchmarks") for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    calls = {file: list(faults(file.read_text())) for file in files}
    assert {str(file.relative_to(ROOT)): found for file, found in calls.items() if found} == {}


@pytest.mark.parametrize(
    "call",
    [
        "AutoConfig.from_pretrained(directory)",
        "AutoConfig.from_pretrained(directory, trust_remote_code=True)",
        "AutoTokenizer.from_pretrained(directory, trust_remote_code=trust)",
        "AutoTokenizer.from_pretrained(directory, **options)",
        "model_class(config).from_config(config)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
    ],
)
def test_a_call_that_does_not_is_noticed(call: str) -> None:
    assert len(list(faults(call))) == 1
