# SPDX-License-Identifier: Apache-2.0
"""These tests have an environment of their own, 4 GB large: ``make test-vllm`` installs it and runs them there.

Elsewhere they are not collected, so that ``pytest`` alone works in the environment of the other tests. Were vLLM
missing from theirs, pytest would find no test there, which is a failure.
"""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py", "contract"]
