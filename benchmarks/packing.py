# SPDX-License-Identifier: Apache-2.0
"""How much of the packed rows is real: padding inside rows, and room left at their ends.

A long-tailed batch is drawn as in reinforcement learning with images: prompts of 200 to 1,300 tokens (a group shares
one), responses log-normal with a median of 400 tokens, cut at 4,096. Every data-parallel rank packs its prompts
first-fit-decreasing under the budget, rows are padded to the layout's multiples, and ranks with fewer rows add empty
ones, exactly as in training (the same ``Packer``).

    python benchmarks/packing.py
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from megatron_g2rpo.data.packing import Packer, PackSequence
from megatron_g2rpo.policy.layouts.layout import FP8_TOKEN_ALIGNMENT, Layout, token_multiples
from megatron_g2rpo.types import ModelInputs

PROMPTS, SAMPLES, DATA_RANKS, BUDGET = 128, 8, 8, 16_384
WIDE = Layout(tensor=4, context=2, sequence_parallel=True)
CASES = {
    "TP1": Layout(),
    "CP2": Layout(context=2),
    "CP8": Layout(context=8),
    "TP4 CP2 SP": WIDE,
    "TP4 CP2 SP, FP8 delayed (16)": replace(WIDE, token_alignment=FP8_TOKEN_ALIGNMENT["delayed"]),
    "TP4 CP2 SP, FP8 blockwise (128)": replace(WIDE, token_alignment=FP8_TOKEN_ALIGNMENT["blockwise"]),
}


def batch(seed: int) -> list[PackSequence]:
    """The rollouts of one step, by prompt."""
    rng = np.random.default_rng(seed)
    sequences = []
    for length in rng.integers(200, 1300, PROMPTS):
        inputs = ModelInputs(
            token_ids=torch.zeros(int(length), dtype=torch.int64),
            pixel_values=torch.zeros(0, 1),
            image_grid_thw=torch.zeros(0, 3, dtype=torch.int64),
        )
        for response in np.clip(rng.lognormal(np.log(400), 1.0, SAMPLES), 1, 4096):
            sequences.append(
                PackSequence(inputs=inputs, response_ids=torch.zeros(int(response), dtype=torch.int64), advantage=1.0)
            )
    return sequences


def measure(sequences: list[PackSequence], layout: Layout) -> tuple[float, float, int]:
    """Share of real tokens in the rows; the same of rows filled up to the budget; rows a rank."""
    sequence, row = token_multiples(layout)
    packer = Packer(
        image_token_id=-1, spatial_merge_size=2, pad_token_id=0, sequence_multiple=sequence, row_multiple=row
    )
    ranks = [sequences[rank::DATA_RANKS] for rank in range(DATA_RANKS)]
    rows = max(len(packer.bins(mine, BUDGET)) for mine in ranks)
    batches = [batch for mine in ranks for batch in packer.pack(mine, BUDGET, num_bins=rows)]
    real = sum(int((batch.segment_ids >= 0).sum()) for batch in batches)
    return real / sum(len(batch.tokens) for batch in batches), real / (len(batches) * BUDGET), rows


def main() -> None:
    """Print the table: the smallest of five batches."""
    batches = [batch(seed) for seed in range(5)]
    longest = max(sequence.length for sequences in batches for sequence in sequences)
    mean = np.mean([sequence.length for sequences in batches for sequence in sequences])
    table = Table(
        title=f"{PROMPTS} prompts x {SAMPLES}, mean {mean:.0f} and longest {longest} tokens, rows of {BUDGET}, "
        f"{DATA_RANKS} data-parallel ranks; smallest of {len(batches)} batches"
    )
    for column in ("layout", "multiples (sequence, row)", "real tokens", "of the budget", "rows a rank"):
        table.add_column(column)
    for name, layout in CASES.items():
        results = [measure(sequences, layout) for sequences in batches]
        real, full, rows = (min(r[0] for r in results), min(r[1] for r in results), max(r[2] for r in results))
        table.add_row(name, str(token_multiples(layout)), f"{real:.2%}", f"{full:.2%}", str(rows))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
