# SPDX-License-Identifier: Apache-2.0
"""``megatron-g2rpo data show``: a page of samples, with their prompts and pictures as the model gets them."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from megatron_g2rpo.commands.data_check import inspector_of
from megatron_g2rpo.commands.model_dir import with_local_model
from megatron_g2rpo.data.dataset import open_dataset
from megatron_g2rpo.data.errors import DataError, SampleError
from megatron_g2rpo.data.inspection import Inspector
from megatron_g2rpo.data.pictures import pictures_of
from megatron_g2rpo.data.processing import ChatProcessor
from megatron_g2rpo.data.shard_index import Entry
from megatron_g2rpo.plan.planner import load_recipe

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
article {{ border: 1px solid #ccc; border-radius: 6px; padding: 1rem; margin: 1rem 0; }}
h2 {{ font-size: 1rem; margin: 0 0 .5rem; }} figure {{ display: inline-block; margin: 0 1rem 0 0; }}
img {{ max-width: 30rem; max-height: 24rem; min-width: 6rem; image-rendering: pixelated; border: 1px solid #ddd; }}
figcaption, dt {{ color: #666; font-size: .85rem; }} dd {{ margin: 0 0 .5rem; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .5rem; margin: 0; }}
.fault {{ color: #b00020; }}
</style></head><body><h1>{title}</h1><p>{about}</p>
{articles}
</body></html>
"""


def run(data: Path, recipe: Path | None, overrides: Sequence[str], *, out: Path, task: str | None, limit: int) -> int:
    """Write the page.

    Args:
        data: the dataset.
        recipe: the recipe that makes prompts of the samples; None shows the samples as they are.
        overrides: ``key=value`` each.
        out: the page to write.
        task: the one task to show; None for all.
        limit: number of samples of each task.

    Returns:
        The number of samples.

    Raises:
        DataError: the dataset cannot be read, or lacks the task.
        RecipeError: the recipe is wrong.
    """
    index = open_dataset(str(data), None)
    if task is not None and task not in index.tasks:
        raise DataError(f"{data} has no task {task!r}; it has {', '.join(index.tasks)}")
    loaded = None if recipe is None else with_local_model(load_recipe(recipe, overrides))
    inspector = inspector_of(index, loaded)
    entries = [entry for each in index.tasks if task in (None, each) for entry in index.entries(each)[:limit]]
    about = "Samples as the dataset has them." if loaded is None else (
        f"Samples as the prompts of {recipe} show them to {loaded.policy.model_name}."
    )  # fmt: skip
    articles = [_article(inspector, entry) for entry in entries]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        _PAGE.format(title=html.escape(str(data)), about=html.escape(about), articles="\n".join(articles)), "utf-8"
    )
    return len(entries)


def _article(inspector: Inspector, entry: Entry) -> str:
    seen = inspector(entry)
    faults = "".join(f'<p class="fault">{html.escape(message)}</p>' for _, message in seen.faults)
    head = f"<h2>{html.escape(entry.name)} · {html.escape(entry.task)}</h2>{faults}"
    try:
        sample = inspector.read(entry)
        pictures = list(sample.images)
    except SampleError:
        return f"<article>{head}</article>"
    captions = [f"{image.width} x {image.height} pixels" for image in pictures]
    fields = {"question": sample.question, "answer": sample.answer, "answer format": seen.answer_format}
    if sample.response is not None:
        fields["response"] = sample.response
    if sample.extra:
        fields["further fields"] = json.dumps(dict(sample.extra), ensure_ascii=False, default=str)
    if inspector.processor is not None and seen.prompt_tokens is not None:
        pictures, captions, fields["prompt"] = _as_prompted(inspector.processor, inspector, entry, captions)
        fields["prompt tokens"] = str(seen.prompt_tokens)
    figures = "".join(_figure(image, caption) for image, caption in zip(pictures, captions, strict=True))
    listed = "".join(f"<dt>{name}</dt><dd><pre>{html.escape(text)}</pre></dd>" for name, text in fields.items())
    return f"<article>{head}{figures}<dl>{listed}</dl></article>"


def _as_prompted(
    processor: ChatProcessor, inspector: Inspector, entry: Entry, captions: list[str]
) -> tuple[list[Image.Image], list[str], str]:
    """What the model gets of a sample: pictures, what was done to each, and the text with one placeholder an image."""
    inputs = processor.encode_sample(inspector.read(entry), 0).inputs
    pictures = pictures_of(inputs, processor)
    merge = processor.spatial_merge_size**2
    tokens = (inputs.image_grid_thw.prod(-1) // merge).tolist()
    resized = [
        f"{caption}; the model gets {picture.width} x {picture.height}, {count} tokens"
        for caption, picture, count in zip(captions, pictures, tokens, strict=True)
    ]
    ids = inputs.token_ids.tolist()
    first = [i for i, token in enumerate(ids) if token != processor.image_token_id or i == 0 or ids[i - 1] != token]
    return pictures, resized, processor.tokenizer.decode([ids[i] for i in first])


def _figure(image: Image.Image, caption: str) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    tag = f'<img alt="" src="data:image/png;base64,{data}">'
    return f"<figure>{tag}<figcaption>{html.escape(caption)}</figcaption></figure>"
