# SPDX-License-Identifier: Apache-2.0
"""What lies around the steps of a run: run directory, checkpoints, validation, logs."""
