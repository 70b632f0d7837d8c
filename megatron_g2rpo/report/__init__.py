# SPDX-License-Identifier: Apache-2.0
"""A run directory, made readable."""
