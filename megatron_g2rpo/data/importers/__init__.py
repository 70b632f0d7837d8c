# SPDX-License-Identifier: Apache-2.0
"""Importers, which read datasets of other formats sample by sample for ``megatron-g2rpo data import``."""

from megatron_g2rpo.data.importers import (  # noqa: F401  (they register themselves)
    conversations,
    easyr1,
    fields,
    jsonl,
    openvlthinker,
    verl,
)
