# SPDX-License-Identifier: Apache-2.0
"""Runs examples/library for some steps and writes what its loss was given, one file a rank (see test_library.py)."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.common.launch import ROOT


def main() -> None:
    """``library_worker.py DIRECTORY STEPS``."""
    directory, steps = Path(sys.argv[1]), int(sys.argv[2])
    spec = importlib.util.spec_from_file_location("trl_g2rpo", ROOT / "examples" / "library" / "trl_g2rpo.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    rewarded: list[dict[str, Any]] = []
    losses: list[dict[str, Any]] = []

    def reward(completion_ids: list[list[int]], prompts: list[str], task: list[str], **columns: Any) -> list[float]:
        values = example.reward(task=task, **columns)
        for ids, prompt, name, value in zip(completion_ids, prompts, task, values, strict=True):
            rewarded.append({"prompt": prompt, "ids": ids, "task": name, "reward": value})
        return values

    class Recorder(example.G2RPOTrainer):
        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
            loss = super()._compute_loss(model, inputs)
            prompts, ids = (
                [
                    row[mask.bool()].tolist()
                    for row, mask in zip(inputs[f"{part}_ids"], inputs[f"{part}_mask"], strict=True)
                ]
                for part in ("prompt", "completion")
            )
            losses.append(
                {
                    "step": self.state.global_step,
                    "prompts": self.processing_class.batch_decode(prompts),
                    "ids": ids,
                    "advantages": inputs["advantages"].tolist(),
                    "loss": loss.item(),
                }
            )
            return loss

    with tempfile.TemporaryDirectory() as output:
        trainer = example.make_trainer(output, steps=steps, kind=Recorder, reward_function=reward)
        trainer.train()
        logged = list(trainer._logs["advantages"])
    record = {"rewarded": rewarded, "losses": losses, "logged": logged}
    (directory / f"rank{os.environ['RANK']}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main()
