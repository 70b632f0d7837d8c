# SPDX-License-Identifier: Apache-2.0
"""Write a dataset of ours as a task of lmms-eval, so that the harness can be run on one's own data.

    python examples/evaluation/local_task.py data/quickstart/val tasks/mine --limit 40
    lmms-eval --include_path tasks/mine --tasks mine ...

The task holds the samples' images and questions as they are, so what is asked is what training asks, with each image
where the question has it; answers are judged by ``megatron_g2rpo.tasks.score_answer``, by the answer format of each
sample.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from megatron_g2rpo.data.shard_index import Entry, ShardIndex
from megatron_g2rpo.tasks import score_answer

YAML = """\
task: {name}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.images
doc_to_text: !function utils.question
doc_to_messages: !function utils.messages
doc_to_target: answer
process_results: !function utils.score
generation_kwargs:
  max_new_tokens: {max_new_tokens}
  temperature: 0
  do_sample: false
metric_list:
  - metric: accuracy
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""

UTILS = """\
# Written by examples/evaluation/local_task.py of megatron_g2rpo.
import io
import json

from PIL import Image

from megatron_g2rpo.tasks import score_answer
from megatron_g2rpo.tasks.prompts import build_messages
from megatron_g2rpo.types import Sample


def images(doc):
    return [Image.open(io.BytesIO(image)).convert("RGB") for image in doc["images"]]


def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def messages(doc, lmms_eval_specific_kwargs=None):
    pictures = images(doc)
    fields = {name: doc[name] for name in ("key", "task", "question", "answer", "answer_format")}
    turns = json.loads(json.dumps(build_messages(Sample(images=pictures, **fields))))  # no part occurs twice
    shown = iter(pictures)
    for turn in turns:
        for part in turn["content"]:
            if part["type"] == "image":
                part["url"] = next(shown)
    return turns


def score(doc, results):
    pictures, extra = images(doc), json.loads(doc["extra"])
    return {"accuracy": score_answer(doc["answer_format"], results[0], doc["answer"], images=pictures, extra=extra)}
"""


def chosen(index: ShardIndex, limit: int | None) -> Iterator[Entry]:
    """The entries of all tasks in turn, so that a limit leaves as many of each as there are."""
    longest = max(len(index.entries(task)) for task in index.tasks)
    turns = (
        index.entries(task)[place]
        for place in range(longest)
        for task in index.tasks
        if place < len(index.entries(task))
    )
    for number, entry in enumerate(turns):
        if number == limit:
            return
        yield entry


def row(index: ShardIndex, entry: Entry) -> dict[str, Any]:
    """A sample as a row: its images as PNG files, and what its answer format may look at as JSON.

    Raises:
        SystemExit: the harness could not judge an answer, such as one in the frame of resized images, whose sizes only
            a model's own image processor knows.
    """
    sample = index.read(entry)
    try:  # as the harness will
        score_answer(sample.answer_format, sample.answer, sample.answer, images=sample.images, extra=sample.extra)
    except ValueError as error:
        raise SystemExit(f"sample {sample.key} cannot be judged: {error}") from error
    pictures = []
    for image in sample.images:
        file = io.BytesIO()
        image.save(file, "PNG")
        pictures.append(file.getvalue())
    return {
        "key": sample.key,
        "task": sample.task,
        "question": sample.question,
        "answer": sample.answer,
        "answer_format": sample.answer_format,
        "images": pictures,
        "extra": json.dumps(dict(sample.extra)),
    }


def main() -> None:
    """Write the task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, help="directory of shards")
    parser.add_argument("out", type=Path, help="directory of the task, whose last part is its name")
    parser.add_argument("--limit", type=int, help="number of samples, taken from all tasks in turn; default: all")
    parser.add_argument("--max-new-tokens", type=int, default=4096, help="longest response (default: %(default)s)")
    arguments = parser.parse_args()
    index = ShardIndex(arguments.dataset)
    rows = [row(index, entry) for entry in chosen(index, arguments.limit)]
    arguments.out.mkdir(parents=True, exist_ok=True)
    data = (arguments.out / "samples.parquet").resolve()
    datasets.Dataset.from_list(rows).to_parquet(data)
    name = arguments.out.resolve().name
    task = YAML.format(name=name, data=data, max_new_tokens=arguments.max_new_tokens)
    (arguments.out / f"{name}.yaml").write_text(task)
    (arguments.out / "utils.py").write_text(UTILS)
    print(f"wrote {len(rows)} samples as the task {name} to {arguments.out}")


if __name__ == "__main__":
    main()
