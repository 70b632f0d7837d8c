# SPDX-License-Identifier: Apache-2.0
"""These tests have an environment of their own, 1.5 GB large: ``make test-trackers`` installs it and runs them there.

Elsewhere they are not collected. Were the trackers missing from theirs, pytest would find no test there: a failure.
"""

import importlib.util
import os
import tempfile

_THERE = all(importlib.util.find_spec(name) for name in ("wandb", "trackio"))
collect_ignore_glob = [] if _THERE else ["test_*.py"]

# Before trackio is imported, which reads it then; nothing that a developer logged is touched, and nobody is called.
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio-")
os.environ["WANDB_MODE"] = "offline"
os.environ["HF_HUB_OFFLINE"] = "1"
for _name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "WANDB_API_KEY", "WANDB_PROJECT"):
    os.environ.pop(_name, None)
