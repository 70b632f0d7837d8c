# SPDX-License-Identifier: Apache-2.0
"""Claim: mathematics and tasks work without a trainer, a model library or an engine, and recipes without torch.

``test_import_rules.py`` reads the import statements; here the packages are out of reach while the code runs, which also
holds for what is imported late. The rooms of a claim share a process, because importing torch is what takes time.
"""

from __future__ import annotations

import subprocess
import sys

TRAINERS = ("megatron.core", "transformers", "vllm")

# Refuses the packages of argv[1], then runs argv[2].
REFUSE = """
import sys
from importlib.abc import MetaPathFinder

refused = sys.argv[1].split(",")

class Refuse(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if any(name == package or name.startswith(package + ".") for package in refused):
            raise ModuleNotFoundError(f"{name} is refused", name=name)

sys.meta_path.insert(0, Refuse())
exec(sys.argv[2])
"""
IMPORT_ALL = """
import importlib, pkgutil
for room in ROOMS:
    path = getattr(importlib.import_module(f"megatron_g2rpo.{room}"), "__path__", [])
    names = [module.name for module in pkgutil.walk_packages(path, f"megatron_g2rpo.{room}.")]
    for name in names:
        if name != "megatron_g2rpo.objective._group_ops":  # an installation may lack it
            importlib.import_module(name)
    print(room, len(names))
"""
COMPUTE = """
import torch
from megatron_g2rpo.objective import gaussian_advantages, group_statistics
from megatron_g2rpo.tasks.answers.numbers import parse_number
rewards, groups, tasks = torch.tensor([0.0, 1.0, 5.0, 9.0]), torch.tensor([0, 0, 1, 1]), torch.zeros(4).long()
advantages = gaussian_advantages(rewards, groups, tasks)
assert torch.equal(advantages, -advantages.flip(0)) and advantages[0] < 0, advantages
assert group_statistics(rewards, groups, tasks).groups.mean.tolist() == [0.5, 7.0]
assert parse_number("3/4") == 0.75
"""
IMPORT_REFUSED = """
import importlib
for name in ("megatron.core", "transformers.utils", "vllm", "megatron_g2rpo.train.g2rpo"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        print(error)
"""


def run(refused: tuple[str, ...], source: str) -> str:
    """What a program prints that can't import some packages; fails with what it says where it fails."""
    command = [sys.executable, "-c", REFUSE, ",".join(refused), source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules(refused: tuple[str, ...], *rooms: str, then: str = "") -> dict[str, int]:
    """Imports every module of some rooms, then runs a program; how many modules each room has."""
    lines = run(refused, f"ROOMS = {rooms!r}\n{IMPORT_ALL}{then}").splitlines()
    return {room: int(count) for room, count in map(str.split, lines)}


def test_mathematics_and_tasks_import_and_compute_without_trainer_model_library_and_engine() -> None:
    found = modules(TRAINERS, "objective", "tasks", "types", "collectives", then=COMPUTE)
    assert found["objective"] >= 20
    assert found["tasks"] >= 3


def test_answer_formats_import_without_torch_and_without_what_they_compare_with() -> None:
    """A recipe's names are checked with them, and whoever waits for that does not wait for SymPy."""
    heavy = ("torch", "numpy", "scipy", "jiwer", "rapidfuzz", "rouge_score", "nltk", "math_verify", "sympy", "PIL")
    assert modules((*TRAINERS, *heavy), "tasks.answers")["tasks.answers"] >= 10


def test_recipes_and_registries_import_without_torch_too() -> None:
    found = modules((*TRAINERS, "torch", "numpy"), "registry", "extend", "recipe")
    assert found["recipe"] >= 10


def test_a_refused_package_is_refused_also_where_our_trainer_wants_it() -> None:
    said = run(TRAINERS, IMPORT_REFUSED).splitlines()
    assert said[:3] == ["megatron.core is refused", "transformers is refused", "vllm is refused"]
    assert said[3].endswith("is refused")
