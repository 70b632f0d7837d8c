# SPDX-License-Identifier: Apache-2.0
"""One rank of test_torchrun_json.py: rank 1 fails, rank 0 would sleep for longer than any test."""

from __future__ import annotations

import os
import time

if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        raise RuntimeError("rank 1 cannot go on")
    time.sleep(3600)
