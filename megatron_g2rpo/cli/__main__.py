# SPDX-License-Identifier: Apache-2.0
"""``python -m megatron_g2rpo.cli``, as torchrun starts it."""

from megatron_g2rpo.cli import main

if __name__ == "__main__":
    main()
