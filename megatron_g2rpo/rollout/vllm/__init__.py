# SPDX-License-Identifier: Apache-2.0
"""Rollouts from vLLM: in the training processes, or from servers over HTTP."""
