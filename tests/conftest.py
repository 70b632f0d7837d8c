# SPDX-License-Identifier: Apache-2.0
"""What holds for all tests."""

from __future__ import annotations

import os

from hypothesis import settings

# No test asks a network; without one the hub's library would try again for 23 seconds. It reads this as it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

# No test is timed: a deadline fails where something else uses the machine.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
