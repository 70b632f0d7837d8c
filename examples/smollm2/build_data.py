# SPDX-License-Identifier: Apache-2.0
"""Build two text tasks of reasoning-gym (Apache-2.0), which makes questions by program, as webdataset shards.

    python examples/smollm2/build_data.py --out data/smollm2

| task           | question                                     | reward of the answer          |
|----------------|----------------------------------------------|-------------------------------|
| chain_sum      | two numbers of one digit, added or subtracted | numeric: 0 or 1               |
| spell_backward | a word of three to five letters              | 1 - normalised edit distance  |

Train and validation share no question. Every sample has a `response`, for supervised training of the format.

Simplified: rewards are this project's, which read the text between <answer> tags. reasoning-gym's own scorers are asked
only whether they accept each reference answer; some of them give credit to prose that mentions it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import reasoning_gym  # pyright: ignore[reportMissingImports]  # of the extra `smollm2`, which `make lint` does without

from megatron_g2rpo.data.shard_writer import ShardWriter

TRAIN_SIZE, VAL_SIZE = 120, 24  # questions a task; reasoning-gym knows 200 chain sums of this size

Fields = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One task: what reasoning-gym is asked for, how its answers are rewarded, and what a response's thinking says."""

    options: dict[str, int]
    answer_format: str
    thinking: Callable[[Fields], str]


TASKS = {
    "chain_sum": Task(
        {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
        "numeric",
        lambda metadata: metadata["expression"],
    ),
    "spell_backward": Task(
        {"min_word_len": 3, "max_word_len": 5}, "edit_distance", lambda metadata: " ".join(metadata["word"])
    ),
}


def questions(name: str, seed: int, size: int) -> Iterator[Fields]:
    """``size`` distinct questions of a task as fields of samples."""
    task, seen = TASKS[name], set()
    dataset = reasoning_gym.create_dataset(name, seed=seed, size=20 * size, **task.options)
    for entry in dataset:
        question, answer = entry["question"], entry["answer"]
        if question in seen:
            continue
        if dataset.score_answer(answer, entry) != 1.0:
            raise ValueError(f"{name}: reasoning-gym does not accept its own answer {answer!r} to {question!r}")
        seen.add(question)
        yield {
            "task": name,
            "question": question,
            "answer": answer,
            "answer_format": task.answer_format,
            "response": f"<thinking>{task.thinking(entry['metadata'])}</thinking><answer>{answer}</answer>",
            "source": f"reasoning-gym {version('reasoning-gym')}, seed {seed}, {entry['metadata']['source_index']}",
        }
        if len(seen) == size:
            return
    raise ValueError(f"{name}: {len(seen)} distinct questions, {size} are needed")


def write(directory: Path, tasks: list[list[Fields]]) -> None:
    """Shards of samples, the tasks in turn."""
    with ShardWriter(directory) as writer:
        for number, fields in enumerate(chain.from_iterable(zip_longest(*tasks))):
            writer.write(f"{directory.name}-{number:06d}", fields, [])


def build(out: Path, seed: int) -> Fields:
    """Write ``out/train``, ``out/val`` and ``out/card.json``; returns the card."""
    samples = [list(questions(name, seed, TRAIN_SIZE + VAL_SIZE)) for name in TASKS]
    write(out / "val", [of_task[:VAL_SIZE] for of_task in samples])
    write(out / "train", [of_task[VAL_SIZE:] for of_task in samples])
    card = {"seed": seed, "samples": {"train": dict.fromkeys(TASKS, TRAIN_SIZE), "val": dict.fromkeys(TASKS, VAL_SIZE)}}
    (out / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    return card


def main() -> None:
    """Build, unless there is something already."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/smollm2"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists already: remove it, or choose another --out")
    print(json.dumps(build(arguments.out, arguments.seed), indent=1))


if __name__ == "__main__":
    main()
