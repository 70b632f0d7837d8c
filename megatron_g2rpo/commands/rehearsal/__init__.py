# SPDX-License-Identifier: Apache-2.0
"""Rehearsals: one rank of each kind of stage runs an optimizer step at real sizes, on tensors without values."""
