# SPDX-License-Identifier: Apache-2.0
"""Encoded image files as the RGB pictures that a person sees in them, and as a lazy sequence that keeps the files only.

What a file holds beside plain 8-bit RGB is read as a viewer shows it:

- Transparency (an alpha channel, or a transparent colour) is composited over white.
- The EXIF orientation is applied; EXIF data that cannot be read has none.
- Greys of 16 bits are cut to their upper 8, as Pillow does for colours of 16 bits. Greys of 32 bits, integers or
  floats, name no white: it is the first of 1 (floats only), 255 and 65,535 that no value exceeds, and where values are
  negative or larger, black and white are the least and the greatest value of the image.
- An animation is its first frame.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
from PIL import ExifTags, Image

from megatron_g2rpo.data.errors import SampleError, because

# Formats that Pillow decodes by itself. Others may not: EPS, for one, has it run the program `gs`.
SUFFIXES = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}
FORMATS = [name for name in SUFFIXES if name != "MPO"]  # a JPEG of several pictures, which Pillow finds behind JPEG

# Width x height beyond which an image is not decoded: 192 MB of RGB. A one-bit PNG of 20 kB can be larger than memory.
MAX_IMAGE_PIXELS = 64_000_000

_TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@because("image")
def read_image(data: bytes, name: str) -> Image.Image:
    """Return the picture in an image file, in mode RGB, as the module's description says.

    Args:
        data: the content of a PNG, JPEG, WebP, GIF, BMP or TIFF file.
        name: name of the image, with which error messages begin.

    Raises:
        SampleError: the file is of another format or damaged, or has more than ``MAX_IMAGE_PIXELS`` pixels, which is
            found before they are decoded.
    """
    with _open(data, name) as image:
        try:
            image.load()
            return _oriented(image, _rgb(image))
        except SampleError as error:
            raise SampleError(f"{name} {error}") from error
        # Decoders of hostile bytes raise whatever they stumble over: struct.error, TypeError, MemoryError...
        except Exception as error:
            raise _undecodable(error, name) from error


def suffix_of(data: bytes, name: str) -> str:
    """Return the file name's suffix that belongs to the content of an image file: ``png``, ``jpg``, ``webp``...

    Args:
        data: the content of an image file, of which the header alone is looked at.
        name: name of the image, with which error messages begin.

    Raises:
        SampleError: the file is of none of the formats that ``read_image`` reads, or has too many pixels.
    """
    with _open(data, name) as image:
        assert image.format is not None  # a file that was opened has one
        return SUFFIXES[image.format]


class EncodedImages(Sequence[Image.Image]):
    """The images of a sample of a shard, kept as files: an image is decoded anew whenever it is taken.

    A photograph of 12 million pixels takes 36 MB decoded and some 3 MB as a file, and a sample lives as long as its
    prompt, in validation for a whole run.

    Args:
        files: content of each image file.
        names: name of each image, with which error messages begin.

    Raises:
        SampleError: by access to an image that cannot be read, see ``read_image``.
    """

    def __init__(self, files: Sequence[bytes], names: Sequence[str]) -> None:
        self._files, self._names = tuple(files), tuple(names)
        self._sizes: list[tuple[int, int] | None] = [None] * len(self._files)

    def __len__(self) -> int:
        return len(self._files)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...

    @overload
    def __getitem__(self, index: slice) -> EncodedImages: ...

    def __getitem__(self, index: int | slice) -> Image.Image | EncodedImages:
        if isinstance(index, slice):
            return EncodedImages(self._files[index], self._names[index])
        try:
            image = read_image(self._files[index], self._names[index])
        except SampleError as error:
            raise SampleError(f"{error} (data.on_bad_sample=skip leaves it out)", error.reason) from error
        self._sizes[index] = image.size
        return image

    def __iter__(self) -> Iterator[Image.Image]:
        return (self[index] for index in range(len(self)))

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Width and height of each image in pixels; an image is decoded for it only where none was taken before."""
        return tuple(size or self[index].size for index, size in enumerate(self._sizes))


def _open(data: bytes, name: str) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        raise SampleError(
            f"{name} is no image of a format that is read ({', '.join(FORMATS)}), or damaged in its header; "
            f"it begins with {data[:8]!r}"
        ) from error
    except Image.DecompressionBombError as error:
        raise SampleError(f"{name} is too large to decode ({error}); scale it down") from error
    except Exception as error:
        raise _undecodable(error, name) from error
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise SampleError(
            f"{name} has {image.width}x{image.height} pixels, more than the {MAX_IMAGE_PIXELS:,} that are decoded; "
            "scale it down"
        )
    return image


def _undecodable(error: Exception, name: str) -> SampleError:
    return SampleError(f"{name} cannot be decoded ({type(error).__name__}: {error}); repair it, or leave it out")


def _rgb(image: Image.Image) -> Image.Image:
    """Return a loaded image in mode RGB, over white where it is transparent."""
    alpha = None
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image)
        transparent = image.info.get("transparency")
        if transparent is not None:
            alpha = Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
        picture = Image.fromarray(_grey(values)).convert("RGB")
    else:
        if isinstance(transparent := image.info.get("transparency"), tuple) and max(transparent) > 255:
            # A colour of 16 bits, whose pixels Pillow has cut to their upper 8.
            image.info["transparency"] = tuple(value >> 8 for value in transparent)
        if not image.has_transparency_data:
            return image.convert("RGB")
        picture = image.convert("RGBA")
        alpha = picture.getchannel("A")
    if alpha is None:
        return picture
    white = Image.new("RGB", picture.size, "white")
    white.paste(picture.convert("RGB"), mask=alpha)
    return white


def _grey(values: np.ndarray) -> np.ndarray:
    """Return greys of 16 or 32 bits, ``[height, width]``, as uint8."""
    if values.dtype.kind == "u":
        return (values >> 8).astype(np.uint8)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise SampleError("holds values that are no finite numbers; repair it, or leave it out")
    whites = [1.0, 255.0, 65535.0] if values.dtype.kind == "f" else [255.0, 65535.0]
    black, white = next(((0.0, white) for white in whites if low >= 0 and high <= white), (low, high))
    # A constant image beyond these scales is black: it has no other value to be told from.
    scaled = (values.astype(np.float64) - black) / max(white - black, np.finfo(np.float64).tiny)
    return (scaled * 255).round().astype(np.uint8)


def _oriented(image: Image.Image, picture: Image.Image) -> Image.Image:
    """Return a picture turned as the EXIF data of its file says."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except (OSError, SyntaxError, ValueError, TypeError, struct.error):  # damaged EXIF data, which viewers ignore
        return picture
    turn = _TRANSPOSED.get(orientation) if isinstance(orientation, int) else None
    return picture if turn is None else picture.transpose(turn)
