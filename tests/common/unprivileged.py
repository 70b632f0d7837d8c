# SPDX-License-Identifier: Apache-2.0
"""Commands that must respect the modes of files, which root does not."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

# What lets root read and write what it may not by mode.
_OVERRIDES = "-dac_override,-dac_read_search,-fowner"


def unprivileged(*command: str | Path, cwd: Path, timeout: int = 240) -> subprocess.CompletedProcess[str]:
    """Run a command for which the modes of files count, as any user or as root."""
    words = [str(word) for word in command]
    if os.geteuid() == 0:
        setpriv = shutil.which("setpriv")
        assert setpriv is not None, "root needs util-linux's setpriv for this test"
        words = [setpriv, f"--bounding-set={_OVERRIDES}", f"--inh-caps={_OVERRIDES}", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
