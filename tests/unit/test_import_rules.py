# SPDX-License-Identifier: Apache-2.0
"""Who may import whom: the contracts of pyproject.toml hold, and each would be noticed if it did not.

Then the rule that no import shows: hardware is named in policy/device.py alone.
"""

from __future__ import annotations

import ast
import logging.config
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_g2rpo"
DEVICE = PACKAGE / "policy" / "device.py"
CONTRACTS = ROOT / "pyproject.toml"

ROOMS = (
    *("cli", "commands", "train", "report", "plan", "rollout", "policy", "policy/layouts", "data", "records"),
    *("models", "weights", "tasks", "objective", "recipe", "processes"),
)
FILES = ("extend", "types", "registry", "collectives", "progress")


def imports_are_legal(config: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    # lint_imports puts the working directory first on sys.path, for good.
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(folder)
    # It configures logging, and with that silences the loggers that exist, for good too.
    monkeypatch.setattr(logging.config, "dictConfig", lambda config: None)
    return lint_imports(config_filename=str(config), no_cache=True, no_logo=True) == 0


def test_the_package_keeps_its_import_rules(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    legal = imports_are_legal(CONTRACTS, ROOT, monkeypatch)
    assert legal, capsys.readouterr().out


@pytest.fixture
def house(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """An empty house with the same rooms and the same contracts, under a name of its own."""
    # A name per test: Python remembers packages that it has seen.
    name = f"house_{abs(hash(request.node.name)):x}"
    house = tmp_path / name
    for module in ["", *ROOMS]:
        (house / module).mkdir()
        (house / module / "__init__.py").touch()
    for file in FILES:
        (house / f"{file}.py").touch()
    (tmp_path / "pyproject.toml").write_text(CONTRACTS.read_text().replace("megatron_g2rpo", name))
    return house


def add_import(house: Path, module: str, imported: str) -> None:
    file = house / f"{module}.py" if module in FILES else house / module / "work.py"
    statement = f"import {imported}" if "." not in imported else "from {} import {}".format(*imported.rsplit(".", 1))
    with file.open("a") as stream:
        stream.write(f"{statement.replace('house', house.name)}\n")


def test_imports_that_point_down_are_legal(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, imported in [
        ("cli", "house.commands"),
        ("commands", "house.train"),
        ("train", "house.rollout"),
        ("train", "house.policy"),
        ("plan", "house.policy"),
        ("policy", "house.models"),
        ("models", "house.weights"),
        ("plan", "house.policy.layouts"),
        ("policy", "transformers"),
        ("report", "house.records"),
        ("records", "house.recipe"),
        ("rollout", "house.tasks"),
        ("rollout", "vllm"),
        ("weights", "house.types"),
        ("objective", "torch"),
        ("types", "torch"),
        ("recipe", "house.registry"),
        ("recipe", "pydantic"),
    ]:
        add_import(house, module, imported)
    assert imports_are_legal(house.parent / "pyproject.toml", house.parent, monkeypatch)


@pytest.mark.parametrize(
    ("module", "imported", "contract"),
    [
        ("weights", "house.policy", "Imports point down"),
        ("train", "house.cli", "Imports point down"),
        ("recipe", "house.objective", "Imports point down"),
        ("types", "house.tasks", "Imports point down"),
        ("types", "house.recipe", "Imports point down"),
        ("processes", "house.recipe", "Imports point down"),
        ("policy", "house.rollout", "Imports point down"),
        ("rollout", "house.policy", "Imports point down"),
        ("data", "house.policy", "Imports point down"),
        ("models", "house.data", "Imports point down"),
        ("records", "house.data", "Imports point down"),
        ("records", "house.train", "Imports point down"),
        ("records", "torch", "Records are read without"),
        ("weights", "house.models", "Imports point down"),
        ("train", "house.commands", "Imports point down"),
        ("registry", "house.recipe", "Imports point down"),
        ("extend", "house.objective", "Imports point down"),
        ("objective", "house.tasks", "Imports point down"),
        ("tasks", "house.objective", "Imports point down"),
        ("report", "house.train", "Imports point down"),
        ("plan", "house.train", "Imports point down"),
        ("policy", "house.plan", "Imports point down"),
        ("objective", "megatron.core", "The mathematics"),
        ("tasks", "transformers", "The mathematics"),
        ("tasks", "vllm", "The mathematics"),
        ("recipe", "torch", "A recipe can be read"),
        ("registry", "torch", "A recipe can be read"),
        ("plan", "megatron.core", "A plan is made without"),
        ("policy/layouts", "megatron.core", "A plan is made without"),
        ("types", "numpy", "The ground is light"),
        ("policy", "vllm", "Only rollout knows vLLM"),
    ],
)
def test_an_illegal_import_is_noticed(
    house: Path,
    module: str,
    imported: str,
    contract: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    add_import(house, module, imported)
    assert not imports_are_legal(house.parent / "pyproject.toml", house.parent, monkeypatch)
    broken = [line for line in capsys.readouterr().out.splitlines() if line.endswith("BROKEN")]
    assert len(broken) == 1
    assert broken[0].startswith(contract)


def test_a_module_without_a_floor_is_noticed(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (house / "utils.py").touch()
    assert not imports_are_legal(house.parent / "pyproject.toml", house.parent, monkeypatch)


HARDWARE = re.compile(r"(^|[,:])(cuda|nccl|gloo)($|[,:])")


def hardware_names(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of everything in a source file that knows what hardware this is; comments and docstrings may."""
    tree = ast.parse(source)
    # A string that stands alone as a statement is a docstring.
    loose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in loose:
            if HARDWARE.search(node.value):
                yield node.lineno, repr(node.value)
        elif isinstance(node, ast.Attribute) and node.attr == "cuda":
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            origin = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            names = [f"{origin}{alias.name}" for alias in node.names]
            yield from ((node.lineno, name) for name in names if f"{name}.".startswith("torch.cuda."))


def test_hardware_is_named_in_the_device_module_alone() -> None:
    found = {
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != DEVICE
        for line, name in hardware_names(path.read_text())
    }
    assert found == set()


def test_the_device_module_is_where_hardware_is_named() -> None:
    # Should it move, the exception above would silently cover nothing.
    names = " ".join(name for _, name in hardware_names(DEVICE.read_text()))
    assert all(word in names for word in ("torch.cuda", "nccl", "gloo"))


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.cuda.synchronize()",
        "import torch.cuda",
        "import torch.cuda.amp as amp",
        "from torch import cuda",
        "from torch.cuda import Stream",
        "x.cuda()",
        'x.to("cuda")',
        "x.to('cuda:0')",
        "x.to(f'cuda:{rank}')",
        'init_process_group("nccl")',
        'init_process_group(backend="cpu:gloo,cuda:nccl")',
        'if device == "cuda": pass',
    ],
)
def test_a_name_of_hardware_is_noticed(source: str) -> None:
    assert list(hardware_names(source))


@pytest.mark.parametrize(
    "source",
    [
        '"""Runs on gloo, cuda or nccl."""',
        'def f():\n    """cuda"""',
        "# torch.cuda",
        "device = 'gpu'",
        "barracuda = 1",
        'raise ValueError("install a CUDA build")',
    ],
)
def test_text_about_hardware_is_not(source: str) -> None:
    assert not list(hardware_names(source))
