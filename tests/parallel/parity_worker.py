# SPDX-License-Identifier: Apache-2.0
"""One rank of the parity test: the cases of one world, one after the other. Usage: DIRECTORY WORLD [WORD...]

Words restrict the cases to those whose description has all of them. Rank 0 prints a line for each case, and what
exceeds its tolerance below it; a case that fails does not keep the next from being tried.
"""

from __future__ import annotations

import gc
import sys
import time
from pathlib import Path

import torch.distributed as dist

from megatron_g2rpo.policy import process_groups
from megatron_g2rpo.policy.device import init_process_group, select
from tests.common.layout_parity import check_layout_parity
from tests.parallel.layouts import WORLDS


def main() -> int:
    directory, world, *words = sys.argv[1:]
    device = select("cpu")
    init_process_group(device)
    # Every layout ends with full collections, which would walk through all that has been imported.
    gc.freeze()
    failed = 0
    for case in WORLDS[world][1]:
        if not set(words) <= set(str(case).split()):
            continue
        start = time.monotonic()
        report = check_layout_parity(Path(directory), device, case)
        process_groups.reset()
        failed += bool(report.failures)
        if dist.get_rank() == 0:
            verdict = "FAILED" if report.failures else "ok"
            print(f"parity {verdict} [{case}] {time.monotonic() - start:.1f} s: {report}", flush=True)
            for failure in report.failures:
                print(f"    {failure}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
