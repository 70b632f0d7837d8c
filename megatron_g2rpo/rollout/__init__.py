# SPDX-License-Identifier: Apache-2.0
"""Rollout engines, which turn prompts into responses; ``base.get("transformers")`` is the embedded default."""
