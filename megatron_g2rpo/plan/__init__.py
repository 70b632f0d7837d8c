# SPDX-License-Identifier: Apache-2.0
"""``megatron-g2rpo plan``: what a layout costs, before any GPU is asked for.

It reads the recipe and the model's config.json, and nothing else: no weights, no process group, no device.
docs/plan.md derives every figure and says which were held against real tensors.
"""
