# SPDX-License-Identifier: Apache-2.0
"""``megatron-g2rpo eval``: how well a model answers a dataset, every answer on file, with intervals and comparisons."""
