# SPDX-License-Identifier: Apache-2.0
"""``megatron-g2rpo`` without its own check of a model against its layout: a program of ``test_rehearsal``."""

from unittest.mock import patch

from megatron_g2rpo import cli
from megatron_g2rpo.plan import planner
from megatron_g2rpo.policy import megatron

if __name__ == "__main__":
    with patch.object(megatron, "check_model"), patch.object(planner, "check_model"):  # what plan refuses first
        cli.app()
