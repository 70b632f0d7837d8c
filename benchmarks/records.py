# SPDX-License-Identifier: Apache-2.0
"""What recording rollouts costs: seconds and share of a run's steps, bytes a rollout; and a step of a large run.

    python benchmarks/records.py [RUN]

Of a run (default: runs/quickstart): medians of ``time/record`` and its share of ``time/step``, sizes of the files.
Of a made step, 128 prompts x 8 answers of 512 tokens: processor's time of both writings, whole, and the bytes.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console

from megatron_g2rpo.records.reading import file_of, files_in, read_header
from megatron_g2rpo.records.schema import Header
from megatron_g2rpo.records.writing import RolloutWriter, table_of

PROMPTS, SAMPLES, TOKENS, VOCABULARY = 128, 8, 512, 151_936
PARTS = ("accuracy", "format", "length")
WORDS = "the a red blue dog cat sign street says open closed left right above car of with and two people".split()  # noqa: SIM905


def of_run(run: Path) -> str:
    """Return a line about a run that has recorded its rollouts."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    recorded = [line for line in lines if "time/record" in line]
    files = {step: path for step, path in files_in(run).items() if read_header(path).is_whole}
    if not recorded or not files:
        raise SystemExit(f"{run} has no whole record of a step")
    seconds = statistics.median(line["time/record"] for line in recorded)
    share = statistics.median(line["time/record"] / line["time/step"] for line in recorded)
    each = [path.stat().st_size / read_header(path).rollouts for path in files.values()]
    return (
        f"{run}: {len(recorded)} steps, {1000 * seconds:.1f} ms a step, {share:.2%} of it; "
        f"{statistics.median(each):.0f} bytes a rollout"
    )


def of_large_step(run: Path) -> str:
    """Return a line about a step of 1,024 long answers, as the first rank of a run writes it."""
    letters, numbers = random.Random(0), np.random.default_rng(0)
    rows, known = [], []
    start = time.process_time()
    for group in range(PROMPTS):
        question = " ".join(letters.choices(WORDS, k=40))
        for sample in range(SAMPLES):
            logprobs = np.log(numbers.beta(5.0, 1.0, TOKENS)).astype(np.float32)
            rows.append(
                {
                    "step": 1,
                    "update": 0,
                    "weights_version": 0,
                    "data_rank": 0,
                    "task": "math",
                    "prompt_key": f"math-000000/{group}",
                    "group_id": group,
                    "sample_index": sample,
                    "prompt_text": question,
                    "question": question,
                    "reference": "7",
                    "answer_format": "numeric",
                    "images": [f"math-000000/{group}#0"],
                    "image_widths": [1024],
                    "image_heights": [1024],
                    "response_text": " ".join(letters.choices(WORDS, k=TOKENS * 3 // 4)),
                    "answer": "7",
                    "well_formed": True,
                    # As text has them: few ids often, many rarely.
                    "response_ids": np.minimum(numbers.zipf(1.3, TOKENS), VOCABULARY - 1).astype(np.int32),
                    "behaviour_logprobs": logprobs,
                    "reward": 1.0,
                    **{f"reward_{part}": 1.0 for part in PARTS},
                    "truncated": False,
                    "engine": "vllm",
                    "seconds": 60.0,
                }
            )
            entropies = numbers.gamma(1.0, 0.4, TOKENS).astype(np.float32)
            known.append(
                {"advantage": float(numbers.normal()), "old_logprobs": logprobs + 1e-4, "entropies": entropies}
            )
    made = time.process_time()
    header = Header(
        run_id="", release="", recipe="", step=1, rollouts=len(rows), data_ranks=1, parts=PARTS
    )  # fmt: skip
    writer = RolloutWriter(run, period=1, budget_mb=1e6, last_step=1, note=print)
    writer.begin(table_of(rows, PARTS), header)
    writer.finish(table_of(known, PARTS, ("advantage", "old_logprobs", "entropies")), PARTS)
    seconds, size = time.process_time() - made, file_of(run, 1).stat().st_size
    return (
        f"{len(rows)} answers of {TOKENS} tokens: {1000 * seconds:.0f} ms a step (making them: {made - start:.1f} s); "
        f"{size / 1e6:.1f} MB, {size / len(rows) / TOKENS:.1f} bytes a token"
    )


if __name__ == "__main__":
    console = Console(soft_wrap=True, highlight=False)
    console.print(of_run(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart")))
    with tempfile.TemporaryDirectory() as folder:
        console.print(of_large_step(Path(folder)))
