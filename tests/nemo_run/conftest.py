# SPDX-License-Identifier: Apache-2.0
"""These tests have an environment of their own, 0.6 GB large: ``make test-nemo-run`` installs it and runs them there.

Elsewhere they are not collected. Were nemo-run missing from theirs, pytest would find no test there: a failure.
"""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("nemo_run") else ["test_*.py"]
