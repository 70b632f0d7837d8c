# SPDX-License-Identifier: Apache-2.0
"""The verbs that are not a loop, one file each, and the launching of several processes."""
