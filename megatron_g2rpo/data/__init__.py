# SPDX-License-Identifier: Apache-2.0
"""Webdataset shards to prompts, and rollouts to packed batches."""
