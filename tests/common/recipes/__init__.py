# SPDX-License-Identifier: Apache-2.0
"""The exemplars with tasks, as tests load them: an exemplar by itself has none."""

from pathlib import Path

G2RPO = Path(__file__).parent / "g2rpo.yaml"
SFT = Path(__file__).parent / "sft.yaml"
