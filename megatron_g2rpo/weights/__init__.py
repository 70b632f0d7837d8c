# SPDX-License-Identifier: Apache-2.0
"""Weight tables, loading, streaming and export: all that reads or writes a model's weights.

Weight tables list parameter names and shard rules, and model families fill them. ``megatron_checkpoint`` and
``hf_model`` are not imported here: what they need takes seconds to import.
"""

from megatron_g2rpo.weights.export import ShardedWriter, export_hf, hf_directory
from megatron_g2rpo.weights.load import load
from megatron_g2rpo.weights.model_files import ProcessorSettings, copy_model_files
from megatron_g2rpo.weights.ownership import NotOursError, Owner, partial_path
from megatron_g2rpo.weights.safetensors_directory import CheckpointError, SafetensorsDirectory
from megatron_g2rpo.weights.stream import WeightSource, specs, stream
from megatron_g2rpo.weights.table import WeightTable

__all__ = [
    "CheckpointError",
    "NotOursError",
    "Owner",
    "ProcessorSettings",
    "SafetensorsDirectory",
    "ShardedWriter",
    "WeightSource",
    "WeightTable",
    "copy_model_files",
    "export_hf",
    "hf_directory",
    "load",
    "partial_path",
    "specs",
    "stream",
]
