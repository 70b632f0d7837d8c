# SPDX-License-Identifier: Apache-2.0
"""What of this folder can run here: nothing is imported, and the reason is given, where there is no CUDA device.

``python -m tests.gpu.virtual_cuda`` makes one of host memory; on a machine with a GPU it is the GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tests.gpu.devices import TRANSFORMER_ENGINE

if TYPE_CHECKING:
    from megatron_g2rpo.policy.device import Device

# Files whose imports alone need Transformer Engine.
_ENGINE_FILES = "test_te_*.py"


def _why_not(path: Path) -> str | None:
    if not torch.cuda.is_available():
        return "needs a CUDA device: `make test-gpu`, or python -m tests.gpu.virtual_cuda python -m pytest tests/gpu"
    if path.match(_ENGINE_FILES) and not TRANSFORMER_ENGINE:
        return "needs Transformer Engine, or --transformer-engine of tests.gpu.virtual_cuda"
    return None


class _Unable(pytest.Module):
    """A file that is skipped without being imported."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        pytest.skip(_why_not(self.path) or "", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Skip a file that cannot run here; None leaves it to pytest."""
    return _Unable.from_parent(parent, path=module_path) if _why_not(module_path) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests for which the machine has too few devices."""
    for item in items:
        needed = item.get_closest_marker("devices")
        if needed is not None and torch.cuda.device_count() < needed.args[0]:
            reason = f"needs {needed.args[0]} CUDA devices, there are {torch.cuda.device_count()}"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def device() -> Device:
    """This process's device, as the only rank of its job."""
    from megatron_g2rpo.policy.device import init_process_group, select

    device = select("gpu")
    init_process_group(device)
    return device


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the models of a file's tests."""
    return tmp_path_factory.mktemp("models")
