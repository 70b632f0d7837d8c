# SPDX-License-Identifier: Apache-2.0
"""What a task is: how it is asked, what an answer looks like, and what an answer is worth."""
