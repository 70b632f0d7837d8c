# SPDX-License-Identifier: Apache-2.0
"""What holds for all tests."""

from __future__ import annotations

from hypothesis import settings

# No test is timed: a deadline fails where something else uses the machine.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
