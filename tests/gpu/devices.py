# SPDX-License-Identifier: Apache-2.0
"""What the tests of this folder run on: a CUDA device, which may be the virtual one, and Transformer Engine, or not."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

# Of this process and of those that it starts (see tests/gpu/virtual_cuda).
VIRTUAL: bool = os.environ.get("VIRTUAL_CUDA") == "1"
TRANSFORMER_ENGINE: bool = find_spec("transformer_engine") is not None

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device: python -m tests.gpu.virtual_cuda makes one"
)
needs_virtual = pytest.mark.skipif(not VIRTUAL, reason="is about the virtual device: python -m tests.gpu.virtual_cuda")
needs_transformer_engine = pytest.mark.skipif(
    not TRANSFORMER_ENGINE, reason="needs Transformer Engine, or --transformer-engine of tests.gpu.virtual_cuda"
)
