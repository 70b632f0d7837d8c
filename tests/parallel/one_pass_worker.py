# SPDX-License-Identifier: Apache-2.0
"""One rank of ``test_one_pass.py``: a step with old log-probabilities of its update, and with some from before it.

Usage: DIRECTORY LAYOUT..., a layout as tp,pp,cp,mode. The directory holds the model. Reports for each layout and case
what differs between both ways, and the metrics and passes of each.
"""

from __future__ import annotations

import sys
from typing import Any

from megatron_g2rpo.policy import process_groups
from megatron_g2rpo.policy.device import init_process_group
from tests.common.hardware import this_device
from tests.common.launch import report_result
from tests.common.one_pass import CASES, differences, recipe_of, take_step
from tests.common.policy_layout import layout_options


def check(directory: str, layout: str) -> dict[str, Any]:
    tp, pp, cp, mode = layout.split(",")
    options = layout_options(directory, tp=int(tp), pp=int(pp), cp=int(cp), mode=mode)
    found = {}
    for case, (keys, row_tokens) in CASES.items():
        own, beforehand = (
            take_step(options, recipe_of(*keys), row_tokens, beforehand=first) for first in (False, True)
        )
        found[case] = {
            "differences": differences(own, beforehand),
            "passes": [own.passes, beforehand.passes],
            "metrics": own.metrics,
        }
    return found


def main() -> None:
    init_process_group(this_device())
    results = {}
    for layout in sys.argv[2:]:
        results[layout] = check(sys.argv[1], layout)
        process_groups.reset()
    report_result(results)


if __name__ == "__main__":
    main()
