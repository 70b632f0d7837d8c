# SPDX-License-Identifier: Apache-2.0
"""One rank of the parity test: the cases of one world, one after the other. Usage: DIRECTORY WORLD [WORD...]

Words restrict the cases to those whose description has all of them. A case whose errors are too large does not keep the
next from being tried. A world is one of ``tests.parallel.layouts`` or ``tests.gpu.layouts``.
"""

from __future__ import annotations

import gc
import sys
import time
from pathlib import Path

from megatron_g2rpo.policy import process_groups
from megatron_g2rpo.policy.device import init_process_group
from tests.common.hardware import this_device
from tests.common.launch import report_result
from tests.common.layout_parity import check_layout_parity
from tests.gpu.layouts import WORLDS as GPU_WORLDS
from tests.parallel.layouts import WORLDS


def main() -> None:
    directory, world, *words = sys.argv[1:]
    device = this_device()
    init_process_group(device)
    # Every layout ends with full collections, which would walk through all that has been imported.
    gc.freeze()
    results = {}
    for case in {**WORLDS, **GPU_WORLDS}[world][1]:
        if not set(words) <= set(str(case).split()):
            continue
        start = time.monotonic()
        report = check_layout_parity(Path(directory), device, case)
        process_groups.reset()
        results[str(case)] = {"worst": report.worst, "seconds": time.monotonic() - start}
    report_result(results)


if __name__ == "__main__":
    main()
