# SPDX-License-Identifier: Apache-2.0
"""The doors for users: decorators that register what a recipe then names."""
