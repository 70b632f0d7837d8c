# SPDX-License-Identifier: Apache-2.0
"""An image file is read as a viewer shows it, and one that cannot or should not be decoded is refused by name."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from megatron_g2rpo.data import images
from megatron_g2rpo.data.errors import SampleError
from megatron_g2rpo.data.images import EncodedImages, read_image, suffix_of

BLACK, WHITE, RED = (0, 0, 0), (255, 255, 255), (255, 0, 0)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def colours(picture):
    assert picture.mode == "RGB"
    return [tuple(colour) for colour in np.asarray(picture).reshape(-1, 3).tolist()]


def png(width, height, *, bits=1, colour=0, rows=b""):
    """A PNG of a header and compressed rows, which need not be all there."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([bits, colour, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_transparent_ground_is_white_whatever_colour_lies_under_it():
    rgba = Image.new("RGBA", (3, 1), (*RED, 0))
    rgba.putpixel((1, 0), (*BLACK, 255))
    rgba.putpixel((2, 0), (*BLACK, 51))
    assert colours(read_image(encoded(rgba), "i")) == [WHITE, BLACK, (204, 204, 204)]
    assert colours(read_image(encoded(rgba, "WEBP", lossless=True, exact=True), "i"))[:2] == [WHITE, BLACK]
    grey = Image.new("LA", (2, 1), (0, 0))
    grey.putpixel((1, 0), (9, 255))
    assert colours(read_image(encoded(grey), "i")) == [WHITE, (9, 9, 9)]


@pytest.mark.parametrize(("mode", "hidden", "shown"), [("L", 7, 9), ("RGB", RED, (1, 2, 3)), ("1", 0, 255)])
def test_a_transparent_colour_is_white(mode, hidden, shown):
    image = Image.new(mode, (2, 1), hidden)
    image.putpixel((1, 0), shown)
    seen = colours(read_image(encoded(image, transparency=hidden), "i"))
    assert seen == [WHITE, shown if mode == "RGB" else (shown,) * 3]


def test_a_transparent_colour_of_a_palette_is_white():
    image = Image.new("P", (2, 1), 0)
    image.putpalette([*RED, 1, 2, 3])
    image.putpixel((1, 0), 1)
    for kind in ("PNG", "GIF"):
        assert colours(read_image(encoded(image, kind, transparency=0), "i")) == [WHITE, (1, 2, 3)]
    assert colours(read_image(encoded(image), "i")) == [RED, (1, 2, 3)]


@pytest.mark.parametrize(("kind", "suffix"), [("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp"), ("TIFF", "tif")])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_the_exif_data_is_applied(kind, suffix, orientation):
    upright = np.zeros((16, 24, 3), dtype=np.uint8)
    upright[:8, :12] = RED  # the corner at the upper left
    turns = [None, None, "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_90", "TRANSVERSE"]
    turn = [*turns, "ROTATE_270"][orientation]  # what a camera did to the picture, the inverse of what a viewer does
    stored = Image.fromarray(upright)
    stored = stored if turn is None else stored.transpose(Image.Transpose[turn])
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, kind, exif=exif)
    seen = np.asarray(read_image(data, "i")).astype(int)
    assert seen.shape == upright.shape
    assert abs(seen - upright).mean() < 16  # JPEG and WebP blur the edges
    assert suffix_of(data, "i") == suffix


def test_greys_of_16_bits_keep_their_order():
    ramp = Image.fromarray(np.array([[0, 1000, 30000, 65535]], dtype=np.uint16))
    for kind in ("PNG", "TIFF"):
        assert colours(read_image(encoded(ramp, kind), "i")) == [(v,) * 3 for v in (0, 3, 117, 255)]
    big_endian = png(2, 1, bits=16, rows=b"\0\xff\xff\x40\x00")
    assert colours(read_image(big_endian, "i")) == [WHITE, (64,) * 3]


def test_a_transparent_grey_or_colour_of_16_bits_is_white():
    def with_transparency(data, value):
        chunk = len(value).to_bytes(4, "big") + b"tRNS" + value + zlib.crc32(b"tRNS" + value).to_bytes(4, "big")
        return data[:33] + chunk + data[33:]

    grey = png(2, 1, bits=16, rows=b"\0\x40\x00\x20\x00")
    assert colours(read_image(with_transparency(grey, b"\x40\x00"), "i")) == [WHITE, (32,) * 3]
    colour = png(2, 1, bits=16, colour=2, rows=b"\0" + b"\x40\x00" * 3 + b"\x20\x00" * 3)
    assert colours(read_image(with_transparency(colour, b"\x40\x00" * 3), "i")) == [WHITE, (32,) * 3]


@pytest.mark.parametrize(
    ("values", "dtype", "greys"),
    [
        ([0.0, 0.5, 1.0], "float32", [0, 128, 255]),
        ([0.0, 0.5, 200.0], "float32", [0, 0, 200]),
        ([0.0, 257.0, 65535.0], "float32", [0, 1, 255]),
        ([-1.0, 0.0, 1.0], "float32", [0, 128, 255]),
        ([0, 1, 200], "int32", [0, 1, 200]),
        ([0, 257, 65535], "int32", [0, 1, 255]),
        ([0, 500000, 1000000], "int32", [0, 128, 255]),
        ([7e9, 7e9, 7e9], "float32", [0, 0, 0]),
    ],
)
def test_greys_of_32_bits_are_scaled_by_the_first_white_that_holds_them(values, dtype, greys):
    image = Image.fromarray(np.array([values], dtype=dtype))
    assert colours(read_image(encoded(image, "TIFF"), "i")) == [(grey,) * 3 for grey in greys]


def test_greys_that_are_no_numbers_are_refused():
    image = Image.fromarray(np.array([[0.0, np.nan]], dtype=np.float32))
    with pytest.raises(SampleError, match=r"^i holds values that are no finite numbers"):
        read_image(encoded(image, "TIFF"), "i")


def test_cmyk_and_the_first_frame_of_an_animation_are_read():
    seen = np.asarray(read_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), "i")).astype(int)
    assert abs(seen - np.array(RED)).max() <= 2
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, WHITE)]
    for kind in ("GIF", "PNG", "WEBP"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert set(colours(read_image(data, "i"))) == {RED}


def test_plain_colours_are_read_as_they_are():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for kind in ("PNG", "BMP", "TIFF"):
        np.testing.assert_array_equal(np.asarray(read_image(encoded(Image.fromarray(pixels), kind), "i")), pixels)


def test_postscript_never_reaches_a_program(monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was started"))
    data = encoded(Image.new("RGB", (4, 4)), "EPS")
    for read in (read_image, suffix_of):
        with pytest.raises(SampleError, match=r"^shard s, sample 'a' is no image of a format that is read \(PNG, JPEG"):
            read(data, "shard s, sample 'a'")


@pytest.mark.parametrize("size", [(13_000, 13_000), (9_000, 10_000)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_too_large_to_decode_is_refused_by_its_header(size):
    for read in (read_image, suffix_of):
        with pytest.raises(SampleError, match=rf"^i has {size[0]}x{size[1]} pixels, more than .*; scale it down"):
            read(png(*size), "i")
    with pytest.raises(SampleError, match=r"^i is too large to decode \(.*exceeds limit.*; scale it down"):
        read_image(png(30_000, 30_000), "i")


def test_the_bound_on_pixels_is_inclusive(monkeypatch):
    monkeypatch.setattr(images, "MAX_IMAGE_PIXELS", 6)
    assert read_image(encoded(Image.new("L", (3, 2))), "i").size == (3, 2)
    with pytest.raises(SampleError, match="7x1 pixels"):
        read_image(encoded(Image.new("L", (7, 1))), "i")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
def test_damage_anywhere_is_a_sample_error_that_begins_with_the_name():
    """Random bytes over random places of small files; whatever a decoder raises, its caller sees one error."""
    generator = np.random.default_rng(0)
    picture = Image.fromarray(generator.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    kinds = {kind: encoded(picture, kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")}
    kinds["deflated"] = encoded(picture, "TIFF", compression="tiff_adobe_deflate")
    refused = []
    for data in kinds.values():
        for _ in range(150):
            damaged = bytearray(data[: generator.integers(len(data) // 2, len(data) + 1)])
            for place in generator.integers(0, len(damaged), 3):
                damaged[place] = generator.integers(256)
            try:
                read_image(bytes(damaged), "shard s")
            except SampleError as error:
                refused.append(str(error))
    assert len(refused) > 100
    assert all(message.startswith("shard s ") for message in refused)


def test_a_decoder_that_raises_what_it_should_not_is_a_sample_error(monkeypatch):
    data = encoded(Image.new("RGB", (4, 4)), "TIFF")
    for error in (TypeError("bad operand"), zlib.error("bad data"), MemoryError()):

        def load(self, error=error):
            raise error

        monkeypatch.setattr("PIL.TiffImagePlugin.TiffImageFile.load", load)
        with pytest.raises(SampleError, match=rf"^i cannot be decoded \({type(error).__name__}"):
            read_image(data, "i")


def test_encoded_images_decode_when_taken_and_keep_the_files_alone(monkeypatch):
    files = [encoded(Image.new("RGB", (4 + i, 3), RED)) for i in range(3)]
    pictures = EncodedImages(files, ["a", "b", "c"])
    assert len(pictures) == 3
    assert pictures[0].size == (4, 3)
    assert pictures[-1].size == (6, 3)
    assert [picture.width for picture in pictures] == [4, 5, 6]
    assert pictures[1:].sizes == ((5, 3), (6, 3))
    with pytest.raises(IndexError):
        pictures[3]
    monkeypatch.setattr(images, "read_image", lambda *_: pytest.fail("decoded again for its size"))
    assert pictures.sizes == ((4, 3), (5, 3), (6, 3))
    assert not any(isinstance(value, Image.Image) for value in vars(pictures).values())


def test_a_broken_encoded_image_is_named_when_it_is_taken():
    with pytest.raises(SampleError, match=r"^second is no image.*data\.on_bad_sample=skip leaves it out"):
        list(EncodedImages([encoded(Image.new("L", (1, 1))), b"nothing"], ["first", "second"]))
