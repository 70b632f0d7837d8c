# SPDX-License-Identifier: Apache-2.0
"""The charts of the page, as plotly's traces and layouts: each function gives the charts of one section.

``charts_of`` is what the page asks for. The page leaves a chart without data out, and says what it needs.
"""

from collections.abc import Sequence

from megatron_g2rpo.report.charts.base import Chart, Measured
from megatron_g2rpo.report.charts.behaviour import entropies, lengths
from megatron_g2rpo.report.charts.learning import learning_curves, reward_parts
from megatron_g2rpo.report.charts.machine import memory, padding, phases, speed
from megatron_g2rpo.report.charts.objective import advantages, clipping, gradients, signal
from megatron_g2rpo.report.charts.rollout import gaps

SECTIONS = (
    ("Learning", (learning_curves, reward_parts)),
    ("Lengths and entropies", (lengths, entropies)),
    ("Advantages and updates", (advantages, signal, gradients, clipping)),
    ("Engine and trainer", (gaps,)),
    ("Time and memory", (phases, speed, memory, padding)),
)


def charts_of(runs: Sequence[Measured]) -> list[tuple[str, list[Chart]]]:
    """Return the charts of each section, those without data among them."""
    return [(title, [chart for make in makers for chart in make(runs)]) for title, makers in SECTIONS]


__all__ = ["Chart", "Measured", "charts_of"]
