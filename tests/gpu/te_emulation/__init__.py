# SPDX-License-Identifier: Apache-2.0
"""Python in the place of ``transformer_engine_torch``, the compiled half of Transformer Engine 2.20.2."""
