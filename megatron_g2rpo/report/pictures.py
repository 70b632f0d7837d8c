# SPDX-License-Identifier: Apache-2.0
"""The pictures of recorded prompts, as thumbnails, and the boxes of references and answers in them.

The records name an image ``<shard>/<sample>#<i>``; it is read from the run's training data. What is not there any more,
or cannot be read, is shown as a placeholder that says why.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from megatron_g2rpo.data.dataset import open_dataset
from megatron_g2rpo.data.errors import DataError
from megatron_g2rpo.data.shard_index import Entry, ShardIndex
from megatron_g2rpo.recipe.data_section import DataSource
from megatron_g2rpo.report.run_directory import RunDirectory
from megatron_g2rpo.tasks.answers.boxes import parse_boxes
from megatron_g2rpo.tasks.answers.frames import answer_scale
from megatron_g2rpo.types import Sample

LARGEST_SIDE = 256  # pixels
JPEG_QUALITY = 70
BOX_FORMATS = ("box_iou", "spatial grounding", "point_in_box", "segmentation")
MOST_BOXES = 20  # of one answer

Corners = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A thumbnail, or why there is none.

    Attributes:
        uri: ``data:`` address of the thumbnail; empty where there is none.
        fault: why there is none; empty where there is one.
    """

    uri: str = ""
    fault: str = ""


class Pictures:
    """Reads the images of a run's prompts.

    Args:
        run: the run, whose recipe names the data. A relative path is tried from the working directory, and then from
            each folder above the run directory.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.fault = ""
        self._entries: dict[str, tuple[ShardIndex, Entry]] = {}
        try:
            for index in _datasets(run):
                for task in index.tasks:
                    self._entries.update({entry.name: (index, entry) for entry in index.entries(task)})
        except (DataError, ValueError) as error:
            self.fault = f"the data cannot be read: {error}"
        self._sample: tuple[str, Sample | None, str] = ("", None, "")
        self._pictures: dict[str, Picture] = {}

    def sample(self, key: str) -> tuple[Sample | None, str]:
        """Return a sample by its key, or None and why it cannot be read."""
        if self._sample[0] != key:
            self._sample = (key, *self._read(key))
        return self._sample[1:]

    def _read(self, key: str) -> tuple[Sample | None, str]:
        if key not in self._entries:
            return None, self.fault or f"the data has no sample {key}"
        index, entry = self._entries[key]
        try:
            return index.read(entry), ""
        except DataError as error:
            return None, str(error)

    def picture(self, reference: str) -> Picture:
        """Return the thumbnail of an image reference."""
        if reference not in self._pictures:
            self._pictures[reference] = self._drawn(reference)
        return self._pictures[reference]

    def _drawn(self, reference: str) -> Picture:
        key, _, number = reference.rpartition("#")
        sample, fault = self.sample(key)
        if sample is None:
            return Picture(fault=fault)
        try:
            return Picture(uri=_thumbnail(sample.images[int(number)]))
        except (DataError, ValueError, IndexError, OSError) as error:
            return Picture(fault=f"image {reference} cannot be shown: {error}")


def boxes_in(
    text: str | None, answer_format: str, sample: Sample | None, sizes: Sequence[tuple[int, int]], *, is_reference: bool
) -> list[Corners]:
    """Return the boxes of a reference or an answer as shares of the image's width and height, for drawing.

    Args:
        text: the reference or the answer; None: there is no answer.
        answer_format: its answer format; one without boxes has none.
        sample: the sample, whose fields name the frame of the coordinates; None where it cannot be read.
        sizes: (width, height) of each image as the model got it.
        is_reference: whether the text is the reference, which may be in another frame than answers.
    """
    if text is None or sample is None or answer_format not in BOX_FORMATS:
        return []
    found = parse_boxes(text) or []
    frame = sample.extra.get("box_frame", "original")
    frame = frame if is_reference else sample.extra.get("answer_frame", frame)
    seen = replace(
        sample, resized_sizes=tuple(sizes), extra={**sample.extra, "box_frame": "fraction", "answer_frame": frame}
    )
    try:
        x, y = answer_scale(seen)
    except (ValueError, DataError):
        return []
    return [(x1 * x, y1 * y, x2 * x, y2 * y) for x1, y1, x2, y2 in found[:MOST_BOXES]]


def _datasets(run: RunDirectory) -> list[ShardIndex]:
    path = run.setting("data.train.path")
    if path is None:
        raise ValueError("the run directory has no recipe that names it")
    return [_dataset(each.path, run.path) for each in DataSource(path=path).parts]


def _dataset(path: str, run: Path) -> ShardIndex:
    """Open a dataset from the first folder that has it; the error is that of the working directory."""
    first: DataError | None = None
    for base in [Path(), *run.resolve().parents]:
        try:
            return open_dataset(str(base / path), None)
        except DataError as error:
            first = first or error
    assert first is not None
    raise first


def _thumbnail(image: Image.Image) -> str:
    """The image as a data address, its longest side at most ``LARGEST_SIDE``, in the smaller of PNG and JPEG."""
    small = image.copy()
    small.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    png, jpeg = io.BytesIO(), io.BytesIO()
    small.save(png, "PNG", optimize=True)
    small.save(jpeg, "JPEG", quality=JPEG_QUALITY)
    kind, file = min((("png", png), ("jpeg", jpeg)), key=lambda each: len(each[1].getvalue()))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
