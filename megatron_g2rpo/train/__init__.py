# SPDX-License-Identifier: Apache-2.0
"""The loops: G2RPO, supervised training, validation; and the state of a run."""
