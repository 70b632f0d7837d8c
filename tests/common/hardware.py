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


def layer_overrides(impl: str = "auto") -> dict[str, str]:
    """Return the keys of ``policy.megatron_cfg`` that choose layers and core attention of a test's policy.

    Args:
        impl: value of both keys. ``auto`` is the recipe's default but for a GPU without Transformer Engine, where the
            recipe would be refused and tests have local layers.
    """
    if impl == "auto" and torch.cuda.is_available() and not optional_packages()["transformer_engine"]:
        impl = "local"
    return {"transformer_impl": impl, "core_attention": impl}
