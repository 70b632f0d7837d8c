# SPDX-License-Identifier: Apache-2.0
"""Importers, which read datasets of other formats sample by sample for ``megatron-g2rpo data import``."""

from megatron_g2rpo.data.importers import jsonl  # noqa: F401  (it registers itself)
