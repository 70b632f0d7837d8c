# SPDX-License-Identifier: Apache-2.0
"""What the tests of run directories share: a claim, and what a run leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_g2rpo.recipe import TrainRecipe
from megatron_g2rpo.train.run.directory import claimed
from megatron_g2rpo.weights.manifest import Manifest, write_manifest

MakeRecipe = Callable[..., TrainRecipe]


def prepare(recipe: TrainRecipe, *, fresh: bool) -> list[str]:
    """Claim the run directory, and end."""
    with claimed(recipe, fresh=fresh) as notes:
        return notes


def begin(run: Path, steps: int = 0) -> None:
    """Leave what a run leaves after its first lines."""
    (run / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(steps + 1)))


def save(checkpoints: Path, step: int, run: str) -> None:
    """Leave a checkpoint of a run."""
    directory = checkpoints / f"step_{step}"
    directory.mkdir(parents=True)
    write_manifest(directory, Manifest(run_id=run, step=step, version="0.5.0", metrics={}, files={}))


def files(directory: Path) -> dict[str, bytes]:
    """All that a directory holds, but who is at work in it."""
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.name != ".lock"}
