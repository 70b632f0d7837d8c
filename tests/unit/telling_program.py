# SPDX-License-Identifier: Apache-2.0
"""What test_program.py runs: tells what it was started with, and how it ends. Usage: CODE"""

from __future__ import annotations

import atexit
import os
import sys

if __name__ == "__main__":
    atexit.register(print, "at its end")
    print(__name__, sys.argv[1:], os.environ.get("G2RPO_SAID"), os.environ.get("RANK"), sys.stdin.read())
    print("to standard error", file=sys.stderr)
    sys.exit(int(sys.argv[1]))
