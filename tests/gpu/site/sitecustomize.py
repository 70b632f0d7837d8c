# SPDX-License-Identifier: Apache-2.0
"""Python runs this at the start of every process that has this folder on its path: see tests/gpu/virtual_cuda."""

import os
import traceback


def _start() -> None:
    import tests.gpu.virtual_cuda.install  # noqa: F401

    if os.environ.get("VIRTUAL_TE") == "1":
        from tests.gpu.te_emulation.load import load_emulation

        load_emulation()
    else:
        from tests.gpu.virtual_cuda.hide import hide

        hide("transformer_engine")  # megatron-core takes parts of it wherever it can be imported


if os.environ.get("VIRTUAL_CUDA") == "1":
    started = False
    try:
        _start()
        started = True
    finally:  # an error is one that Python would print and pass over, and the process would go on without a device
        if not started:
            traceback.print_exc()
            os._exit(1)
