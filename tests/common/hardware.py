# SPDX-License-Identifier: Apache-2.0
"""The device that tests run on, a GPU where torch sees one, and the layers that a policy can have there.

The same tests run on a CPU, on a GPU, and on one made of host memory (``tests/gpu``). What they compare with is always
computed on the CPU, and compared there: see ``tests.common.compare``.
"""

from __future__ import annotations

import torch

from megatron_g2rpo.policy.device import Device, select
from megatron_g2rpo.policy.machine import optional_packages


def this_device() -> Device:
    """Return the device of this process."""
    return select()


def layers_of(impl: str = "auto") -> str:
    """Return the layers that ``layer_overrides`` leads to here, ``local`` or ``transformer_engine``."""
    engine = torch.cuda.is_available() and optional_packages()["transformer_engine"]
    return ("transformer_engine" if engine else "local") if impl == "auto" else impl


def layer_overrides(impl: str = "auto", precision: str = "float32") -> dict[str, str]:
    """Return the keys of ``policy.megatron_cfg`` that choose layers and core attention of a test's policy.

    Args:
        impl: value of both keys. ``auto`` is the layers of ``layers_of``, with their core attention where that exists:
            Transformer Engine has none for padded rows in float32.
        precision: data type of the weights.
    """
    if impl == "auto" and torch.cuda.is_available():
        layers = layers_of()
        return {"transformer_impl": layers, "core_attention": "local" if precision == "float32" else layers}
    return {"transformer_impl": impl, "core_attention": impl}
