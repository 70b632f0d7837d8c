# SPDX-License-Identifier: Apache-2.0
"""Rows of a step as a run records them, made of a few numbers."""

from __future__ import annotations

import random
from typing import Any

import pyarrow as pa

from megatron_g2rpo.records.schema import Header
from megatron_g2rpo.records.writing import table_of

PARTS = ("accuracy", "format")
# Task of each group: one task has four of six groups.
TASKS = ("chart", "chart", "math", "chart", "ocr", "chart")
SAMPLES = 4


def row(step: int, group: int, sample: int, **changes: Any) -> dict[str, Any]:
    """One rollout; its numbers tell which it is."""
    task, tokens = TASKS[group % len(TASKS)], 3 + sample
    values = {
        "step": step,
        "update": 0,
        "weights_version": step - 1,
        "data_rank": group % 2,
        "task": task,
        "prompt_key": f"{task}-000000/{group}",
        "group_id": group,
        "sample_index": sample,
        "prompt_text": f"<|im_start|>user\n<image>question {group}<|im_end|>\n",
        "question": f"<image>question {group}",
        "reference": str(group),
        "answer_format": "numeric",
        "images": [f"{task}-000000/{group}#0"],
        "image_widths": [64],
        "image_heights": [32],
        "response_text": f"<answer>{sample}</answer>",
        "answer": str(sample),
        "well_formed": True,
        "response_ids": [100 * group + sample] * tokens,
        "behaviour_logprobs": [-0.1 * (sample + 1)] * tokens,
        "reward": 0.9 * (sample % 2) + 0.1,
        "reward_accuracy": float(sample % 2),
        "reward_format": 1.0,
        "truncated": sample == 3,
        "engine": "transformers",
        "seconds": 0.5,
    }
    return {**values, **changes}


def known_row(group: int, sample: int, **changes: Any) -> dict[str, Any]:
    """What the updates make known of it."""
    tokens = 3 + sample
    values = {
        "advantage": sample - 1.5,
        "old_logprobs": [-0.125 * (sample + 1)] * tokens,
        "entropies": [0.5] * tokens,
    }
    return {**values, **changes}


def step_table(step: int, **changes: Any) -> pa.Table:
    """The rollouts of a step, as they are sampled; ``changes`` are those of every row."""
    rows = [row(step, group, sample, **changes) for group in range(len(TASKS)) for sample in range(SAMPLES)]
    return table_of(rows, PARTS)


def long_table(step: int) -> pa.Table:
    """The same with answers of two thousand letters, which no compression makes shorter than half."""
    table, letters = step_table(step), random.Random(step)
    texts = [letters.randbytes(1000).hex() for _ in range(table.num_rows)]
    return table.set_column(table.schema.get_field_index("response_text"), "response_text", pa.array(texts))


def known_table() -> pa.Table:
    """What the updates make known of them."""
    rows = [known_row(group, sample) for group in range(len(TASKS)) for sample in range(SAMPLES)]
    return table_of(rows, PARTS, ("advantage", "old_logprobs", "entropies"))


def header(step: int, rollouts: int = len(TASKS) * SAMPLES) -> Header:
    return Header(run_id="abc", release="0", recipe="digest", step=step, rollouts=rollouts, data_ranks=2, parts=PARTS)
