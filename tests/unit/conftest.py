# SPDX-License-Identifier: Apache-2.0
"""What holds for all unit tests."""

from __future__ import annotations

from tests.common.leftovers import no_process_is_left

__all__ = ["no_process_is_left"]
