# SPDX-License-Identifier: Apache-2.0
"""Claim: the package installs without a C++ compiler and says what it lacks, and a wheel holds what it should."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")
FOLDERS = ("csrc", "constraints", "megatron_g2rpo")
NO_COMPILER = "/nonexistent/c++"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build in, without anything that was built before."""
    directory = tmp_path_factory.mktemp("sources")
    for name in FILES:
        shutil.copy(ROOT / name, directory)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return directory


def build(sources: Path, switch: str | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python where there is no compiler, with MEGATRON_G2RPO_BUILD_EXT as given; None: unset."""
    environment = {name: value for name, value in os.environ.items() if name != "MEGATRON_G2RPO_BUILD_EXT"}
    environment.update(CXX=NO_COMPILER, CC=NO_COMPILER)
    if switch is not None:
        environment["MEGATRON_G2RPO_BUILD_EXT"] = switch
    return subprocess.run(
        [sys.executable, *arguments], cwd=sources, env=environment, capture_output=True, text=True, timeout=240
    )


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A wheel that was built without a compiler, and what pip said."""
    out = tmp_path_factory.mktemp("wheel")
    offline = ("--no-build-isolation", "--no-deps", "--no-index", "--verbose", "--wheel-dir", str(out))
    done = build(sources, None, "-m", "pip", "wheel", *offline, ".")
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    return next(out.glob("*.whl")), output


def test_without_a_compiler_the_build_goes_on_and_warns(wheel: tuple[Path, str]) -> None:
    path, output = wheel
    assert "WARNING: Could not compile megatron_g2rpo.objective._group_ops" in output
    assert "installed WITHOUT it" in output
    assert not [name for name in zipfile.ZipFile(path).namelist() if name.endswith(".so")]


def test_what_was_installed_so_says_so_at_import_and_works(wheel: tuple[Path, str], tmp_path: Path) -> None:
    zipfile.ZipFile(wheel[0]).extractall(tmp_path)
    script = (
        "import torch, megatron_g2rpo.objective as o; print(o.__file__, o.backend()); one = torch.zeros(2).long()\n"
        "print(o.gaussian_advantages(torch.tensor([0.0, 1.0]), one, one).tolist())"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    where, numbers = done.stdout.splitlines()
    assert where == f"{tmp_path}/megatron_g2rpo/objective/__init__.py torch"
    assert numbers.startswith("[-0.674489")
    assert "_group_ops is not built: advantages run on the slower torch implementation" in done.stderr


def test_a_wheel_holds_what_is_no_python_file(wheel: tuple[Path, str]) -> None:
    names = set(zipfile.ZipFile(wheel[0]).namelist())
    wanted = {"megatron_g2rpo/py.typed", "megatron_g2rpo/objective/_group_ops.pyi"}
    wanted |= {f"megatron_g2rpo/recipe/exemplars/{path.name}" for path in exemplars()}
    assets = ROOT / "megatron_g2rpo" / "report" / "assets"
    wanted |= {str(path.relative_to(ROOT)) for path in assets.rglob("*") if path.is_file()}
    assert "megatron_g2rpo/report/assets/plotly/LICENSE" in wanted
    assert wanted <= names
    assert [name for name in names if name.endswith(".dist-info/licenses/megatron_g2rpo/report/assets/plotly/LICENSE")]


def exemplars() -> list[Path]:
    """The recipes that the package carries; at least the two kinds' own."""
    found = sorted((ROOT / "megatron_g2rpo" / "recipe" / "exemplars").glob("*.yaml"))
    assert len(found) >= 2
    return found


@pytest.mark.parametrize(
    ("switch", "code", "message"),
    [
        ("1", 1, "To install without it, unset MEGATRON_G2RPO_BUILD_EXT."),
        ("0", 0, ""),
        ("yes", 1, "MEGATRON_G2RPO_BUILD_EXT must be 0, 1 or unset, got 'yes'"),
    ],
)
def test_the_switch_says_what_a_missing_compiler_means(
    sources: Path, tmp_path: Path, switch: str, code: int, message: str
) -> None:
    done = build(sources, switch, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path))
    assert done.returncode == code, done.stdout + done.stderr
    assert message in done.stderr
