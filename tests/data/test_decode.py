"""Image files of every mode, damaged or not: what is decoded, and what is said of the others."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from uncollapse.data.decode import decode
from uncollapse.errors import DataError


def picture(i: int) -> Image.Image:
    """A plain RGB image that tells its number: red is i."""
    return Image.new("RGB", (6, 4), (i, 100, 200))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def as_png(array: np.ndarray, mode: str | None = None) -> bytes:
    return encoded(Image.fromarray(array) if mode is None else Image.fromarray(array).convert(mode))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(picture(7)), (7, 100, 200)),
        (encoded(Image.new("L", (3, 3), 90)), (90, 90, 90)),
        (encoded(Image.new("1", (3, 3), 1)), (255, 255, 255)),
        (encoded(picture(7).quantize(4)), (7, 100, 200)),
        (encoded(Image.new("RGBA", (3, 3), (10, 20, 30, 0))), (255, 255, 255)),
        (encoded(Image.new("RGBA", (3, 3), (10, 20, 30, 255))), (10, 20, 30)),
        (encoded(Image.new("LA", (3, 3), (10, 0))), (255, 255, 255)),
        (encoded(Image.new("P", (3, 3), 0), transparency=0), (255, 255, 255)),
        (encoded(Image.new("L", (3, 3), 5), transparency=5), (255, 255, 255)),
        (as_png(np.full((3, 3), 128 * 257, np.uint16)), (128, 128, 128)),
        (encoded(Image.fromarray(np.full((3, 3), 40 * 257, np.int32)), "TIFF"), (40, 40, 40)),
        (encoded(Image.fromarray(np.full((3, 3), 0.2, np.float32)), "TIFF"), (51, 51, 51)),
    ],
    ids=[
        "rgb",
        "grey",
        "1-bit",
        "palette",
        "rgba-clear",
        "rgba-opaque",
        "la",
        "palette-clear",
        "grey-clear",
        "16-bit",
        "int32",
        "float",
    ],
)
def test_decode_modes(data, expected):
    image = decode(data)
    assert image.mode == "RGB"
    assert image.getpixel((1, 1)) == expected


def test_decode_cmyk_jpeg_is_close_to_its_colour():
    pixel = decode(encoded(picture(20).convert("CMYK"), "JPEG", quality=100)).getpixel((1, 1))
    assert np.abs(np.array(pixel) - (20, 100, 200)).max() <= 6


def test_half_transparent_is_mixed_with_white():
    pixel = decode(encoded(Image.new("RGBA", (3, 3), (0, 100, 200, 128)))).getpixel((0, 0))
    assert np.abs(np.array(pixel) - (127, 177, 227)).max() <= 1


def test_decode_path(tmp_path):
    picture(9).save(tmp_path / "a.png")
    assert decode(tmp_path / "a.png").getpixel((0, 0)) == (9, 100, 200)


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no bytes"),
        (b"hello, I am a text file", "not an image"),
        (encoded(NOISE, "JPEG")[:-400], "truncated"),
        (encoded(NOISE)[:-400], "truncated|broken"),
        (encoded(Image.fromarray(np.full((3, 3), 7.0, np.float32)), "TIFF"), "outside 0..1"),
        (encoded(Image.fromarray(np.full((3, 3), np.nan, np.float32)), "TIFF"), "outside 0..1"),
        (encoded(Image.fromarray(np.full((3, 3), -4, np.int32)), "TIFF"), "outside 0..65535"),
    ],
    ids=["empty", "text", "jpeg", "png", "float", "nan", "negative"],
)
def test_undecodable(data, reason):
    with pytest.raises(DataError, match=reason) as error:
        decode(data)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("limit", [1500, 700])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_bad_images(monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(DataError, match=r"40×40|1600"):
        decode(encoded(NOISE))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2000), st.binary(min_size=1, max_size=8))
def test_damaged_files_decode_or_raise_data_error(at, junk):
    good = encoded(NOISE, "JPEG")
    at %= len(good)
    try:
        image = decode(good[:at] + junk + good[at + len(junk) :])
    except DataError:
        return
    assert image.mode == "RGB"
