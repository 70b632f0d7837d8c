# SPDX-License-Identifier: Apache-2.0
"""``megatron-g2rpo plan``: what a layout costs in memory and traffic, before any GPU is reserved.

The package reads the recipe and the model's config.json, and nothing else: no weights, no process group, no device.
docs/plan.md derives every figure and says which were held against real tensors.
"""
