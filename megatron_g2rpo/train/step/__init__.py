# SPDX-License-Identifier: Apache-2.0
"""What one step of the G2RPO loop is made of."""
