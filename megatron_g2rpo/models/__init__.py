# SPDX-License-Identifier: Apache-2.0
"""Model families: what each one is, in one file."""
