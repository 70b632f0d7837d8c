# SPDX-License-Identifier: Apache-2.0
"""Claims about looking for optional packages: nothing is imported to find one, and what breaks megatron-core is named.

Packages are stood in for by files on the path. What is claimed of megatron-core is tested with the real one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_g2rpo.policy import machine
from megatron_g2rpo.policy.device import driver_version

Install = Callable[[dict[str, str]], None]
EXPLODES = "raise SystemError('imported')"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put modules, path -> source, where this process and its children find them first."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))

    def write(modules: dict[str, str]) -> None:
        for name, source in modules.items():
            file = tmp_path / f"{name}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source)
            if file.parent != tmp_path and not (file.parent / "__init__.py").exists():
                (file.parent / "__init__.py").write_text(EXPLODES)

    return write


def test_packages_are_found_without_being_imported(install: Install) -> None:
    install(
        {"flash_attn/flash_attn_interface": EXPLODES, "flash_attn/cute": EXPLODES, "amp_C": EXPLODES, "vllm": EXPLODES}
    )
    found = machine.optional_packages()
    assert {name for name in ("flash_attn", "flash_attn_4", "apex", "vllm", "flash_attn_3") if found[name]} == {
        *("flash_attn", "flash_attn_4", "apex", "vllm")
    }
    assert not {"flash_attn", "amp_C", "vllm"} & sys.modules.keys()


def test_flash_attention_4_alone_is_not_version_2(install: Install) -> None:
    """Both are in the package ``flash_attn``."""
    install({"flash_attn/cute": ""})
    found = machine.optional_packages()
    assert (found["flash_attn"], found["flash_attn_4"]) == (False, True)


def test_the_apex_of_pypi_is_told_from_nvidias(install: Install) -> None:
    assert machine.foreign_apex() is None
    install({"apex/models": ""})
    assert "an unrelated project of PyPI" in (machine.foreign_apex() or "")
    install({"apex/normalization": ""})
    assert "without its compiled parts" in (machine.foreign_apex() or "")
    install({"amp_C": ""})
    assert machine.foreign_apex() is None


def test_megatron_core_takes_any_apex_for_nvidias(install: Install) -> None:
    """The trap is real: it would build FusedLayerNorm without kernels. If it is mended there, drop ``foreign_apex``."""
    install({"apex": ""})
    program = (
        "from megatron.core.models.gpt import gpt_layer_specs as specs; print(specs.HAVE_APEX, specs.LNImpl.__name__)"
    )
    done = machine.run_python(["-c", program])
    assert done.stdout.split() == ["True", "FusedLayerNorm"], done.stderr


def test_megatron_core_dies_of_half_a_transformer_engine_and_the_reason_is_given(install: Install) -> None:
    install({"transformer_engine": "raise RuntimeError('Found empty meta package')"})
    assert machine.broken_imports(["megatron-core"]) == {"megatron-core": "RuntimeError: Found empty meta package"}


def test_a_package_that_kills_its_process_is_broken_and_this_one_lives(install: Install) -> None:
    install({"flash_attn_3/flash_attn_interface": "import os; os.kill(os.getpid(), 11)", "flash_attn_3/__init__": ""})
    assert machine.broken_imports(["flash_attn_3"]) == {"flash_attn_3": "the import ended with status -11"}


def test_what_can_be_imported_is_not_broken(install: Install) -> None:
    install({"fused_weight_gradient_mlp_cuda": ""})
    assert machine.broken_imports(["apex_wgrad", "vllm"]) == {}, "vllm takes long, and is looked for only"


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:05:57 UTC 2025\n", "580.65.06"),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  575.57.08  Release Build\nGCC version: 12\n",
            "575.57.08",
        ),
        ("something else\n", None),
    ],
)
def test_the_driver_says_its_version(tmp_path: Path, text: str, version: str | None) -> None:
    file = tmp_path / "version"
    assert driver_version(file) is None
    file.write_text(text)
    assert driver_version(file) == version
