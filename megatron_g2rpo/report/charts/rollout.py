# SPDX-License-Identifier: Apache-2.0
"""Is the engine still the policy? The gap between its log-probabilities and the trainer's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_g2rpo.report.charts.base import Chart, Measured, axes, by_task, of_names


def gaps(runs: Sequence[Measured]) -> Iterator[Chart]:
    """Mean gap of each task; largest gap and KL divergence over all."""
    yield Chart(
        name="gap",
        title="Rollout gap of each task",
        about=(
            "The mean absolute difference between the engine's and the trainer's log-probabilities of the same tokens: "
            "rounding noise if it is small and flat; if it grows, the engine is no longer the policy."
        ),
        traces=by_task(runs, "rollout_gap_mean"),
        layout=axes("nats", yaxis={"title": {"text": "nats"}, "exponentformat": "e"}),
    )
    yield Chart(
        name="gap-largest",
        title="Largest gap, and KL divergence",
        about=(
            "The largest difference of a single token, and KL(engine || trainer): one outlier is a rare token, many "
            "are a bug in the weights or the template."
        ),
        traces=of_names(runs, {"train/rollout_gap_max": "largest gap", "train/rollout_gap_kl": "KL divergence"}),
        layout=axes("nats", yaxis={"title": {"text": "nats"}, "exponentformat": "e"}),
    )
