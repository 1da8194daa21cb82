"""Images, Parquet and CSV files that are damaged or made to do harm: they cost themselves and nothing else."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageFile

from uncollapse.config.schema import DataConfig, ViewConfig
from uncollapse.data.decode import decode
from uncollapse.data.images import LazyImages
from uncollapse.data.load import load_images
from uncollapse.data.views import view_specs
from uncollapse.data.workers import eval_batches, view_loader
from uncollapse.errors import DataError
from uncollapse.evaluate.data.layouts import inat_parts, list_parts

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def plain(red: int = 0, size: tuple[int, int] = (6, 4)) -> bytes:
    return encoded(Image.new("RGB", size, (red, 100, 200)))


def folders(root: Path, counts: dict[str, int], first: int = 0) -> Path:
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for k in range(count):
            (root / name / f"{k:03}.png").write_bytes(plain(first))
            first += 1
    return root


# --- formats and orientation --------------------------------------------------------------------------------


def tiff_of_one_tile(side: int) -> bytes:
    """An 8×8 grey TIFF in one tile of side×side."""
    tags = [(256, 8), (257, 8), (258, 8), (259, 8), (262, 1), (277, 1), (322, side), (323, side), (324, 8), (325, 8)]
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 16) + bytes(8) + struct.pack("<H", len(tags)) + fields + bytes(4)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (POSTSCRIPT, "not an image that is read here, looks like EPS; read are JPEG, PNG, WEBP, "),
        (encoded(Image.new("RGB", (4, 4)), "ICO"), "not an image that is read here, looks like ICO"),
        (encoded(Image.new("RGB", (4, 4)), "TGA"), "not an image that is read here"),
        (plain()[:16] + b"!" + plain()[17:], "begins like PNG, but its header is damaged"),
        (tiff_of_one_tile(1 << 17), "more than the limit"),
    ],
    ids=["postscript", "icon", "targa", "cut", "tile"],
)
def test_other_formats_are_refused_by_name(tmp_path, monkeypatch, data, reason):
    def never(*_: object) -> None:
        raise AssertionError("handed to Ghostscript")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", never)
    (tmp_path / "a.png").write_bytes(data)
    for source in (data, tmp_path / "a.png"):
        with pytest.raises(DataError, match=reason):
            decode(source)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind, orientation):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :, 0] = pixels[:, :16, 1] = 255  # red above, green at the left
    turns: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda x: x,
        2: np.fliplr,
        3: lambda x: np.rot90(x, 2),
        4: np.flipud,
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x, -1),
        7: lambda x: np.rot90(x, 2).transpose(1, 0, 2),
        8: np.rot90,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = np.asarray(decode(encoded(Image.fromarray(pixels), kind, exif=exif)))
    expected = turns[orientation](pixels)
    assert found.shape == expected.shape
    corners = np.ix_([2, -3], [2, -3])
    assert np.array_equal(found[corners] > 127, expected[corners] > 127)


def test_damaged_exif_does_not_cost_the_image():
    data = encoded(Image.new("RGB", (6, 4), (9, 9, 9)), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert decode(data).size == (6, 4)


def test_turned_images_in_a_set(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for k in range(8):
        Image.new("RGB", (12, 4), (k, 0, 0)).save(tmp_path / f"{k}.png", exif=exif)
    train, held = load_images(tmp_path, DataConfig(), 0)
    assert tuple(train.canvas.shape[2:]) == tuple(held.canvas.shape[2:]) == (12, 4)


# --- sizes are known before anything is decoded -------------------------------------------------------------


def test_a_set_too_large_for_memory_is_not_decoded(tmp_path, monkeypatch):
    for k in range(12):
        path = tmp_path / "train" / f"{k}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(Image.new("1", (1500, 1500))))
    folders(tmp_path / "val", {"a": 2})
    decoded = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: (decoded.append(self.size), load(self))[1])
    train, _ = load_images(tmp_path, DataConfig(memory_gb=0.05), 0)
    assert isinstance(train, LazyImages)
    assert set(decoded) == {(6, 4)}  # the held-out ones


def test_an_image_of_too_many_pixels_is_unreadable_and_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    folders(tmp_path / "train", {"a": 10, "b": 10})
    folders(tmp_path / "val", {"a": 4})
    (tmp_path / "train" / "a" / "zzz.png").write_bytes(encoded(Image.new("1", (120, 120))))
    for config in (DataConfig(), DataConfig(memory_gb=0)):
        train, _ = load_images(tmp_path, config, 0)
        for i in range(len(train)):
            train.image(i)
        assert [b.split("/")[-1] for b in train.bad] == ["zzz.png: 120×120 pixels are more than the limit of 10000"]


@pytest.mark.parametrize("layout", ["struct", "bytes"])
def test_one_large_value_for_many_rows_is_unpacked_once(tmp_path, layout):
    large, n = bytes(2_000_000), 150
    image = pa.DictionaryArray.from_arrays(np.zeros(n, np.int32), pa.array([large]))
    column = pa.StructArray.from_arrays([image], ["bytes"]) if layout == "struct" else image
    path = tmp_path / "bomb.parquet"
    options = {"compression": "zstd", "dictionary_pagesize_limit": 1 << 30, "store_schema": False}
    pq.write_table(pa.table({"image": column}), path, **options)
    assert path.stat().st_size < 10_000
    with pytest.raises(DataError, match="135 of 135 images cannot be read"):
        load_images(path, DataConfig(), 0)
    assert pa.default_memory_pool().max_memory() < 20 * len(large)


def test_parquet_that_states_too_much(tmp_path, monkeypatch):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": [{"bytes": plain() * 50, "path": None}] * 9 + [None]}), path, compression="zstd")
    monkeypatch.setattr("uncollapse.data.parquet.GROUP_BYTES", 1000)
    with pytest.raises(DataError, match=r"row group 0 unpacks to .* GB in column 'image.bytes'"):
        load_images(path, DataConfig(), 0)
    nulls = pa.table({"image": pa.nulls(1_000_000, pa.struct([("bytes", pa.binary())]))})
    pq.write_table(nulls, path, compression="zstd", row_group_size=1_000_000)
    with pytest.raises(DataError, match=r"1,000,000 rows in a file of .* bytes cannot hold images"):
        load_images(path, DataConfig(), 0)


# --- unreadable images cost themselves ----------------------------------------------------------------------


def test_unreadable_held_out_images_that_are_not_in_memory(tmp_path):
    folders(tmp_path / "train", {"a": 20, "b": 20})
    folders(tmp_path / "val", {"a": 10, "b": 10})
    (tmp_path / "val" / "a" / "003.png").write_bytes(b"junk")
    _, held = load_images(tmp_path, DataConfig(memory_gb=0), 0)
    assert isinstance(held, LazyImages)
    assert len(held) == 19
    assert len(held.bad) == 1
    assert "val/a/003.png: not an image" in held.bad[0]
    rows = torch.cat([i for i, _ in eval_batches(held, 8, (0, 0, 0), (1, 1, 1), 7)])
    assert rows.tolist() == list(range(19))
    views = list(view_loader(held, [(0, range(19), range(19))], view_specs(ViewConfig(global_size=8))[:1], 0, 0))
    assert len(views[0][0]) == 19
    (tmp_path / "val" / "b" / "003.png").write_bytes(b"junk")
    with pytest.raises(DataError, match="2 of 20 images cannot be read"):
        load_images(tmp_path, DataConfig(memory_gb=0), 0)


def test_a_damaged_row_group_costs_its_rows(tmp_path):
    cells = [{"bytes": plain(i), "path": None} for i in range(40)]
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table({"image": cells}), path, row_group_size=4, use_dictionary=False, compression="zstd")
    column = pq.ParquetFile(path).metadata.row_group(3).column(0)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset : column.data_page_offset + column.total_compressed_size] = bytes(
        column.total_compressed_size
    )
    path.write_bytes(data)
    pq.write_table(pa.table({"image": cells[:4]}), tmp_path / "test.parquet")
    for memory_gb in (2, 0):
        train, _ = load_images(tmp_path, DataConfig(memory_gb=memory_gb, max_bad=0.1), 0)
        found = [train.image(i).getpixel((0, 0))[0] for i in range(len(train))]
        assert set(found) == set(range(40)) - {12, 13, 14, 15}
        assert len(train.bad) == 4
        assert "row 12: " in train.bad[0]
        assert "cannot read row group 3" in train.bad[0]


# --- any bytes ----------------------------------------------------------------------------------------------


def outcome(read: Callable[[], Any]) -> Any:
    """What ``read`` returns, or the one line of its refusal; anything else that it raises fails the test."""
    try:
        return read()
    except DataError as error:
        line = str(error)
    assert line.isprintable()
    return line


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Bytes changed, cut, doubled or filled, at one to three places; often where a header is."""
    out = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(min(len(out), 64) if rng.random() < 0.4 else len(out)))
        match int(rng.integers(5)):
            case 0:
                out[at] = int(rng.integers(256))
            case 1:
                out[at : at + 4] = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\xff\xff"])
            case 2:
                del out[at : at + int(rng.integers(1, 40))]
            case 3:
                out[at:at] = out[at : at + int(rng.integers(1, 40))]
            case _:
                out[at : at + 8] = rng.bytes(8)
        out = out or bytearray(b"\0")
    return bytes(out)


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000", "PPM"])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning", "ignore::UserWarning")
def test_mutated_images_decode_or_raise_data_error(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    good = encoded(NOISE, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP") else {}))
    outcomes, rng = set(), np.random.default_rng(1)
    for _ in range(100):
        image = outcome(lambda: decode(mutated(good, rng)))
        outcomes.add("refused" if isinstance(image, str) else image.mode)
    assert outcomes <= {"RGB", "refused"}


def parquet_bytes() -> bytes:
    out = io.BytesIO()
    cells = [{"bytes": plain(i), "path": f"{i}.png"} for i in range(12)]
    table = pa.table({"image": cells, "label": [0, 1, 2] * 4, "class": ["a", "b", "c"] * 4})
    pq.write_table(table, out, row_group_size=4, compression="zstd")
    return out.getvalue()


def csv_bytes() -> bytes:
    return b"path,label\n" + b"".join(b'"%03d.png",%d\n' % (k, k % 3) for k in range(12))


@pytest.mark.parametrize(("name", "make"), [("x.parquet", parquet_bytes), ("x.csv", csv_bytes)])
def test_mutated_sets_load_or_raise_data_error(tmp_path, name, make):
    for k in range(12):
        (tmp_path / f"{k:03}.png").write_bytes(plain(k))
    good, rng, loaded = make(), np.random.default_rng(2), 0
    for k in range(150):
        (tmp_path / name).write_bytes(mutated(good, rng))
        config = DataConfig(max_bad=1, memory_gb=2 * (k % 2))
        found = outcome(lambda: load_images(tmp_path / name, config, 0, progress=False))  # noqa: B023
        loaded += not isinstance(found, str)
    assert 0 < loaded < 150


@pytest.mark.parametrize(
    ("name", "good", "read"),
    [
        (
            "train2018.json",
            b'{"images": [{"id": 1, "file_name": "a.png"}], "categories": [{"id": 3, "name": "\xc3\xa9"}], '
            b'"annotations": [{"image_id": 1, "category_id": 3}]}',
            inat_parts,
        ),
        ("list.txt", b"a.png 0\na.png 1\n", lambda path: list_parts(str(path))),
    ],
    ids=["json", "list"],
)
def test_mutated_lists_of_images_load_or_raise_data_error(tmp_path, name, good, read):
    (tmp_path / "a.png").write_bytes(plain())
    rng = np.random.default_rng(3)
    special = [
        b"[" * 100_000,
        b'{"images": [{"id": 1e999, "file_name": "a"}], "categories": [], "annotations": []}',
        b'{"images": 3, "categories": 4, "annotations": 5}',
        b"a.png 99999999999999999999",
        b"a.png 99999999",
    ]
    for data in (*special, *(mutated(good, rng) for _ in range(200))):
        (tmp_path / name).write_bytes(data)
        found = outcome(lambda: read(tmp_path / name))
        assert isinstance(found, str) or found[0].labels.max() < 1 << 20
