# SPDX-License-Identifier: Apache-2.0
"""The process of one side: it takes a step for each line that it reads, and answers with a line of JSON.

``run`` starts one for each side and lets them take turns, so that all are measured on the same machine in the same
state, and none shares its memory with another.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.step.sizes import BY_NAME, FLOOR, OURS, OURS_UNSHARED, SIDES, TRL, TRL_MICRO, Size


class _Ended(Exception):
    """No more steps are asked for."""


class _Channel:
    """Lines in and out; whatever libraries print goes to standard error."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def send(self, message: dict[str, Any]) -> None:
        """Write a line."""
        print(json.dumps(message), file=self._out, flush=True)

    def wait(self) -> None:
        """Wait until a step is asked for."""
        if not sys.stdin.readline():
            raise _Ended


def stepper(side: str, size: Size, directory: Path) -> Callable[[], Any]:
    """Return the function that takes a step of ours or of the floor."""
    if side == FLOOR:
        from benchmarks.step.floor import Side

        return Side(size, directory).step
    from benchmarks.step.ours import Side as Ours

    return Ours(size, directory, shared=side == OURS).step


def serve(side: str, size: Size, directory: Path, channel: _Channel) -> None:
    """Take steps until no more are asked for."""
    try:
        if side in (TRL, TRL_MICRO):
            from benchmarks.step import trl

            def hand_over(step: Any) -> None:
                channel.send(step.record())
                channel.wait()

            channel.wait()
            trl.serve(size, directory, micro_batches=side == TRL_MICRO, hand_over=hand_over)
        assert side in (OURS, OURS_UNSHARED, FLOOR)
        step = stepper(side, size, directory)
        while True:
            channel.wait()
            channel.send(step().record())
    except _Ended:
        return


def main() -> None:
    """Serve one side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("size", choices=sorted(BY_NAME))
    parser.add_argument("directory", type=Path, help="where model and prompts are")
    arguments = parser.parse_args()
    serve(arguments.side, BY_NAME[arguments.size], arguments.directory, _Channel())


if __name__ == "__main__":
    main()
