# SPDX-License-Identifier: Apache-2.0
"""Processes that work for this one, started from a server without threads: none is a fork of this process."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext

__all__ = ["forkserver"]


def forkserver(preload: Sequence[str] = ()) -> ForkServerContext:
    """Return the context of worker processes that say nothing of their own when this process ends while they start.

    Args:
        preload: names of modules that the server imports once for all of its workers. The server is one for the whole
            process; what is named after it has started is not preloaded.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__name__}.server", *preload])
    return context
