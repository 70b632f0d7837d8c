# SPDX-License-Identifier: Apache-2.0
"""Several processes on this machine, and how a job of one or many ends with an error: at once, with one message.

When a rank fails, its peers fail next, in the collective that they waited in. So a rank that was launched here leaves
its message, with the time, in the file that torchrun gives it, and the launcher prints that of the cause (``cause``).
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from megatron_g2rpo.commands import cause
from megatron_g2rpo.policy.device import DeviceError
from megatron_g2rpo.rollout.base import EngineUnavailable
from megatron_g2rpo.tasks.scoring import RewardError
from megatron_g2rpo.train.run.signals import STOPPED
from megatron_g2rpo.train.run.stopping import RunStopped

_LAUNCHED = "MEGATRON_G2RPO_LAUNCHED"
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
TRACEBACK = "MEGATRON_G2RPO_TRACEBACK"
INTERRUPTED = 130  # the shell's exit code for Ctrl-C


class JobError(RuntimeError):
    """A process of the job failed; the message is that of the one that failed first."""


# What a user can mend: the message says how, and a traceback would bury it.
EXPECTED = (ValueError, OSError, FloatingPointError, RewardError, DeviceError, EngineUnavailable, JobError, RunStopped)


def is_rank() -> bool:
    """Whether torchrun started this process."""
    return "RANK" in os.environ


def is_launched() -> bool:
    """Whether ``launch`` started this process; a launcher has then checked what one process can."""
    return is_rank() and _LAUNCHED in os.environ


def launch(processes: int, arguments: Sequence[str], *, stoppable: bool = False) -> None:
    """Run ``megatron-g2rpo ARGUMENTS`` on several processes of this machine, and wait for them.

    Args:
        processes: number of processes.
        arguments: the command and its arguments.
        stoppable: whether a signal asks the processes to stop, in their own time, instead of ending them.

    Raises:
        JobError: one of them failed; the others have been ended.
        SystemExit: they were stopped, or ended by a signal.
    """
    from megatron_g2rpo.commands import torchrun

    os.environ[_LAUNCHED] = "1"
    # A rank that is ended leaves its workers' semaphores to Python's tracker, which removes them and warns. Its process
    # knows this variable alone.
    warnings = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join([*filter(None, [warnings]), "ignore:resource_tracker:UserWarning"])
    logging.disable()  # torchrun's account of a failed process; what matters of it is raised here
    run = torchrun.run if stoppable else torchrun.run_plainly
    try:
        with cause.marks() as marks:
            try:
                code = run(["--standalone", f"--nproc-per-node={processes}", "-m", "megatron_g2rpo.cli", *arguments])
            except ChildFailedError as error:
                raise JobError(cause.first(error.failures, marks)) from None
    except SignalException as error:
        sys.exit(128 + int(error.sigval))
    finally:
        logging.disable(logging.NOTSET)
        del os.environ[_LAUNCHED]
        if warnings is None:
            del os.environ["PYTHONWARNINGS"]
        else:
            os.environ["PYTHONWARNINGS"] = warnings
    if code:
        sys.exit(code)


def end(error: BaseException) -> NoReturn:
    """End this process because of ``error``: with its message if a user can mend it, else with its traceback.

    A rank leaves without Python's shutdown, which may wait for a collective that its peers never join; one whose run
    was stopped has none to wait for.
    """
    if isinstance(error, RunStopped) and error.resumable:
        if int(os.environ.get("RANK", "0")) == 0:
            print(error, flush=True)
        sys.exit(STOPPED)
    if isinstance(error, KeyboardInterrupt):
        _leave(INTERRUPTED)
    expected = isinstance(error, EXPECTED) and not os.environ.get(TRACEBACK)
    text = str(error) if expected else "".join(traceback.format_exception(error)).rstrip()
    if not _is_told_to_launcher(text, error):
        who = f"rank {os.environ['RANK']}: " if is_rank() else ""
        Console(stderr=True).print(f"error: {who}{text}", style="red", markup=False, highlight=False, soft_wrap=True)
    _leave(1)


def _is_told_to_launcher(text: str, error: BaseException) -> bool:
    """Leave the message of a rank for its launcher; whether there is one, and a disk that takes it."""
    if not is_launched() or _ERROR_FILE not in os.environ:
        return False
    now = time.time()
    record = {"message": text, "timestamp": int(now), cause.TIME: now, cause.KIND: cause.kind(error)}
    try:
        Path(os.environ[_ERROR_FILE]).write_text(json.dumps(record))
    except OSError:  # a full disk must not keep the watchdog from ending the process
        return False
    return True


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    if is_rank() or threading.current_thread() is not threading.main_thread():  # the watchdog's: the main one hangs
        os._exit(code)
    sys.exit(code)
