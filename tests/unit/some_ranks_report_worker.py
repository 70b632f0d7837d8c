# SPDX-License-Identifier: Apache-2.0
"""One rank of test_torchrun_json.py. Usage: RANK..., the ranks that report; the others end without a word."""

from __future__ import annotations

import os
import sys

from tests.common.launch import report_result

if __name__ == "__main__" and os.environ["RANK"] in sys.argv[1:]:
    report_result({"rank": int(os.environ["RANK"]), "error": float("inf")})
