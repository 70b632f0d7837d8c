# SPDX-License-Identifier: Apache-2.0
"""Reports on a finished run, made from its run directory."""
