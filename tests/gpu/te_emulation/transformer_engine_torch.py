# SPDX-License-Identifier: Apache-2.0
"""Executed by Transformer Engine as its extension module: see ``load.py`` and ``extension.py``."""

from tests.gpu.te_emulation import extension as _extension

globals().update(_extension.offered())
calls = _extension.calls
