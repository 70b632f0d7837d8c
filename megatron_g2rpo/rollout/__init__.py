# SPDX-License-Identifier: Apache-2.0
"""Engines that turn prompts into samples: ``base.get("transformers")`` is the embedded default."""
