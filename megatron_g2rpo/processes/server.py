# SPDX-License-Identifier: Apache-2.0
"""What the server of worker processes imports, and only it: a worker that finds its parent gone ends without a word.

A parent that ends, or is killed, while its workers start takes with it the pipe and the named semaphores that they read
first. Each would print a traceback below the parent's own message, which alone says what happened.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from types import TracebackType

# Files of the standard library that a starting worker reads its parent's pipe and semaphores in.
_READERS = ("/multiprocessing/synchronize.py", "/multiprocessing/spawn.py", "/multiprocessing/connection.py")


def _say_unless_orphaned(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    last = traceback.extract_tb(trace)[-1].filename if trace is not None else ""
    if isinstance(error, FileNotFoundError | EOFError | ConnectionError) and last.endswith(_READERS):
        return
    sys.__excepthook__(kind, error, trace)


sys.excepthook = _say_unless_orphaned

# A signal to all processes of a terminal or of a job asks the run to stop, which still needs its workers: they end
# with it. SIGTERM ends one that does not come back, and is left as it is.
if hasattr(os, "setsid") and os.getpid() != os.getpgrp():
    os.setsid()
for _number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(_number, signal.SIG_IGN)
