# SPDX-License-Identifier: Apache-2.0
"""Experiment trackers beside ``metrics.jsonl``: what fails or hangs in one is its own affair, never the run's.

Each tracker is a process of its own (``worker``), which knows its library (``backends``) and nothing of torch. The run
(``feed``) hands it a JSON object a line, over a queue that drops what does not fit rather than wait.
"""
