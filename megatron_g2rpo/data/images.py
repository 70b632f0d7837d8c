# SPDX-License-Identifier: Apache-2.0
"""Encoded images: which format one has, and its pixels as RGB."""

from __future__ import annotations

import io

from PIL import Image

from megatron_g2rpo.data.errors import SampleError

_SUFFIXES = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tiff"}


def suffix_of(data: bytes, name: str) -> str:
    """Return the file suffix of an encoded image, recognised by its content.

    Raises:
        SampleError: it is no image of a known format; the message begins with ``name``.
    """
    try:
        with Image.open(io.BytesIO(data), formats=list(_SUFFIXES)) as image:
            return _SUFFIXES[str(image.format)]
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise SampleError(f"{name}: no image of the formats {', '.join(_SUFFIXES)}; convert it first") from error


def read_image(data: bytes, name: str) -> Image.Image:
    """Decode an image to RGB.

    Raises:
        SampleError: it cannot be decoded; the message begins with ``name``.
    """
    try:
        return Image.open(io.BytesIO(data), formats=list(_SUFFIXES)).convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise SampleError(f"{name}: cannot be decoded ({type(error).__name__}: {error})") from error
