# SPDX-License-Identifier: Apache-2.0
"""Tasks: how a sample becomes a prompt, how responses are read, and how they are rewarded."""
