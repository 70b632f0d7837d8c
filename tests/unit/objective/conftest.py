# SPDX-License-Identifier: Apache-2.0
"""Runs a test on both implementations of the group-statistics op."""

from __future__ import annotations

import pytest

from megatron_g2rpo.objective import advantages


@pytest.fixture(params=["cpp", "torch"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Names the implementation that the public functions use during the test."""
    if request.param == "torch":
        monkeypatch.setattr(advantages, "_extension", None)
    elif advantages.backend() != "cpp":
        # Not a skip: `make test` builds the op, and a build that was lost must not look like a pass.
        pytest.fail("the compiled op is not built; reinstall the package with a C++17 compiler")
    return request.param
