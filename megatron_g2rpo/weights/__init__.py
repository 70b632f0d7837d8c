# SPDX-License-Identifier: Apache-2.0
"""One table of names and shard rules; everything that reads or writes weights goes through it."""

from megatron_g2rpo.weights.checkpoint import CheckpointError, SafetensorsDirectory
from megatron_g2rpo.weights.export import ShardedWriter, copy_companions, export_hf
from megatron_g2rpo.weights.load import load
from megatron_g2rpo.weights.mapping import table_for
from megatron_g2rpo.weights.stream import WeightSource, specs, stream
from megatron_g2rpo.weights.table import WeightTable

__all__ = [
    "CheckpointError",
    "SafetensorsDirectory",
    "ShardedWriter",
    "WeightSource",
    "WeightTable",
    "copy_companions",
    "export_hf",
    "load",
    "specs",
    "stream",
    "table_for",
]
