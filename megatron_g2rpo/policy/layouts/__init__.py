# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of parallel layouts: pure functions that ``policy`` uses to compute and ``plan`` to predict."""
