# SPDX-License-Identifier: Apache-2.0
"""One rank of the parity test: every given shape at one tensor-parallel size. Usage: DIRECTORY TENSOR SHAPE..."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_g2rpo.policy.device import select
from tests.parity import check_parity


def main() -> None:
    directory, tensor, *shapes = sys.argv[1:]
    for shape in shapes:
        errors = check_parity(Path(directory), select("cpu"), tensor=int(tensor), shape=shape)
        print(f"parity {shape}: {errors}", flush=True)


if __name__ == "__main__":
    main()
