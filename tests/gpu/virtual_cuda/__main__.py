# SPDX-License-Identifier: Apache-2.0
"""Runs a command on the virtual GPU: python -m tests.gpu.virtual_cuda [--transformer-engine] COMMAND..."""

from __future__ import annotations

import os
import sys

from tests.gpu.virtual_cuda.build import build, environment


def main() -> None:
    arguments = sys.argv[1:]
    engine = arguments[:1] == ["--transformer-engine"]
    command = arguments[engine:]
    if not command:
        sys.exit(__doc__)
    build()
    os.execvpe(command[0], command, {**os.environ, **environment(transformer_engine=engine)})


if __name__ == "__main__":
    main()
