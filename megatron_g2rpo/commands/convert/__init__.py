# SPDX-License-Identifier: Apache-2.0
"""``megatron-g2rpo convert``: Hugging Face directories to Megatron checkpoints, and back."""
